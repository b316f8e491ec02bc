"""Start scripts as forks of a process that has imported the large libraries, which takes longer than what they do."""

import atexit
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

LIBRARIES = (
    "jax",
    "torch",
    "transformers.models.t5",
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox",
    "diffusers.models.embeddings",
    "diffusers.schedulers.scheduling_ddim_cogvideox",
    "diffusers.schedulers.scheduling_dpm_cogvideox",
)
SCRIPTS = "stage1_text_encoder", "stage2_transformer", "stage3_vae_decoder"
SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([*LIBRARIES])


class Fork:
    """A process of its own that runs a script, with its output in two files; it is used as subprocess.Popen is."""

    def __init__(self, command: list[str], cwd: Path, env: Mapping[str, str], out: Path, err: Path):
        """Start what `stage_command` returned for a script, and wait until the script begins."""
        begins, begun = _forks.Pipe(duplex=False)
        self._process = _forks.Process(target=_run, args=(command[1:], cwd, dict(env), out, err, begun))
        self._process.start()
        begun.close()
        begins.recv()
        self.pid = self._process.pid

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        """Wait for the end; return the exit status."""
        self._process.join(timeout)
        assert self.poll() is not None, f"process {self.pid} has not ended in {timeout} s"
        return self.poll()


def _run(argv: list[str], cwd: Path, env: Mapping[str, str], out: Path, err: Path, begun: Connection) -> None:
    """Become the program of a command line; say when it begins."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    multiprocessing.set_start_method("fork", force=True)  # as in any program
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for script in SCRIPTS:
        importlib.import_module(script)  # and with it the modules that receive signals
    sys.argv[:], sys.path[:0] = argv, [str(Path(argv[0]).parent)]
    begun.send(True)
    try:
        runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a fork of multiprocessing leaves out
