"""Run a stage as several processes, such as one on each host of a TPU slice: find the others, agree, and end together.

Process 0 writes the files and says what happens. The others compute their share, and print only what goes wrong, with
their number. With one process nothing here does anything. Importing this module loads no jax.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import mmap
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from cogvideox.cli.program import BEFORE_FAILURE, ENDS_AT_ONCE
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, videos, writing
from cogvideox.files.names import ROOT
from cogvideox.run import accelerator
from cogvideox.versions import LIBRARIES, versions

HEARTBEAT_SECONDS = 20  # a process that is not heard of for so long counts as dead, and all others end
GATHERING_SECONDS = 300  # in which all processes must have started
WAITING_SECONDS = 24 * 3600  # for the others, whose downloads may take their time; the dead are noticed anyway
PORT = 8482  # of process 0 on a TPU slice, where nobody names one; it is jax's choice too

# Options in which the processes may differ; only process 0 prints and logs.
OWN = ("coordinator_address", "process_id", "verbose", "quiet", "log_json")

# Says of what slice a host is a part; the server of the metadata of a TPU VM, which no other machine has.
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"

FATAL = "Terminating process because the JAX distributed service detected fatal errors"


@dataclasses.dataclass
class Hosts:
    """The processes of a run, and the place of this one among them; by default it is alone.

    Attributes:
        process: the number of this process; process 0 writes the files.
        processes: how many there are.
        agreements: how often `agree` was called, for the names of what is exchanged.
    """

    process: int = 0
    processes: int = 1
    agreements: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files: it is process 0, or the only one."""
        return self.process == 0

    @property
    def are_many(self) -> bool:
        """Whether several processes run this stage together."""
        return self.processes > 1

    def own(self, devices: Sequence[Any]) -> list[Any]:
        """Return the jax devices of this process, the only ones that it can ask for their memory."""
        return [device for device in devices if not self.are_many or device.process_index == self.process]

    @contextlib.contextmanager
    def claimed(
        self, folder: Path, stage: str, warn: Callable[[str], None] | None = None, asked: Path | None = None
    ) -> Iterator[None]:
        """Keep `folder`, where process 0 writes, for this run; see `writing.claimed`."""
        with writing.claimed(folder, stage, warn, asked) if self.is_first else contextlib.nullcontext():
            yield

    def agree(self, values: Mapping[str, str]) -> None:
        """Compare what the processes have under each name; all of them must call this, in the same order.

        Raises:
            UserError: a process differs from process 0; the message names the first one and in what.
        """
        if not self.are_many:
            return
        self.agreements += 1
        found = [json.loads(one) for one in self._exchange(f"agreement {self.agreements}", json.dumps(values).encode())]
        for process, theirs in enumerate(found):
            for name in dict.fromkeys([*found[0], *theirs]):
                ours = found[0].get(name), theirs.get(name)
                if ours[0] != ours[1]:
                    shown = "" if any(value and len(value) == 64 for value in ours) else f": {ours[1]}, not {ours[0]}"
                    self.end_together(
                        f"process {process} differs from process 0 in {name}{shown}; start all of them alike"
                    )

    def agree_on_model(self, model_id: str, component: str, variant: str | None) -> None:
        """Compare what each host reads of the model: see `checkpoint.files_of`; of weights the headers and sizes.

        Raises:
            UserError: see `agree`.
        """
        if not self.are_many:
            return
        files = checkpoint.files_of(model_id, component, variant)
        self.agree({f"the model's file {file.parent.name}/{file.name}": _digest(file) for file in files})

    def agree_on_files(self, files: Sequence[Path]) -> None:
        """Compare files that each host reads from its own disk, of weights headers and sizes; raises as `agree`."""
        self.agree({str(file): _digest(file) for file in files})

    def end_together(self, message: str) -> NoReturn:
        """Part from the other processes, which all do the same now, and raise UserError, as if this one were alone."""
        import jax

        jax.distributed.shutdown()
        self.processes = 1
        raise UserError(message)

    def wait_for_end(self, error: Exception) -> None:
        """Wait so long that jax ends this process if the error came from the devices as another process has ended."""
        if self.are_many and type(error).__name__ == "JaxRuntimeError":
            time.sleep(HEARTBEAT_SECONDS + 10)

    def _exchange(self, name: str, value: bytes) -> list[bytes]:
        """Give all processes what each of them has; returns it in their order. It travels beside the devices."""
        client = _client()
        client.key_value_set_bytes(f"{name}/{self.process}", value)
        keys = [f"{name}/{process}" for process in range(self.processes)]
        return [client.blocking_key_value_get_bytes(key, 1000 * WAITING_SECONDS) for key in keys]

    def _share_inputs(self, folder: Path, names: Sequence[str], copy: Path) -> None:
        """Send the files that process 0 has in `folder` to all others, which write them to their folder `copy`."""
        client, key = _client(), "inputs"
        if self.is_first:
            folders = dict.fromkeys([folder, *videos.prompts(folder), *videos.videos(folder)])
            paths = [str((one / name).relative_to(folder)) for one in folders for name in names]
            client.key_value_set(key, json.dumps(paths))
        for name in json.loads(client.blocking_key_value_get(key, 1000 * WAITING_SECONDS)):
            if self.is_first:
                content = b""  # which is what process 0 says of a file that it cannot read
                with contextlib.suppress(OSError):
                    content = (folder / name).read_bytes()
                client.key_value_set_bytes(f"input {name}", content)
            elif content := client.blocking_key_value_get_bytes(f"input {name}", 1000 * WAITING_SECONDS):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(content)


def join(arguments: argparse.Namespace, inputs: Sequence[str]) -> Hosts:
    """Join the other processes of the run, if there are any, and agree with them; the first thing that a stage does.

    In a process other than process 0 the options change: it is quiet and logs and profiles nothing, and --input_dir is
    a copy of the input files of process 0.

    Args:
        arguments: the parsed options, those of `add_host_options` and --input_dir among them.
        inputs: names of the stage's files in --input_dir, or in the folders there.

    Raises:
        UserError: the options of `add_host_options` do not fit together, the processes differ in their options
            or versions, or an option works with one process only.
    """
    place = _place(arguments)
    if place is None:
        return Hosts()
    hosts = Hosts(process=place[2], processes=place[1])
    ENDS_AT_ONCE.append(lambda: hosts.are_many)  # an orderly end would wait for the other processes
    BEFORE_FAILURE.append(hosts.wait_for_end)
    accelerator.prepare_libraries(arguments.profile is not None, arguments.verbose)
    scratch = Path(tempfile.mkdtemp(prefix="cogvideox-"))
    _start_relay(hosts.process, scratch)
    if hosts.is_first and not arguments.quiet:
        print(f"process 0 of {place[1]}, which waits for the others at {place[0]}", flush=True)
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM
    try:
        jax.distributed.initialize(
            *place, initialization_timeout=GATHERING_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot join the run at --coordinator_address {place[0]}: {reason}; try another port"
        ) from None
    hosts.agree(
        {f"--{name}": str(value) for name, value in vars(arguments).items() if name not in OWN}
        | {f"the version of {name}": version for name, version in versions(*LIBRARIES).items()}
        | {"the version of Python": sys.version.split()[0], "the files of this project": sources()}
    )
    hosts._share_inputs(arguments.input_dir, inputs, scratch)
    if arguments.dump:
        hosts.end_together(f"--dump works with one process, not with {place[1]}; use one host, or drop --dump")
    if arguments.executable:
        hosts.agree({f"--executable {arguments.executable}": _digest(arguments.executable)})
    if not hosts.is_first:
        arguments.input_dir = scratch
        arguments.quiet, arguments.verbose, arguments.log_json, arguments.profile = True, False, None, None
    return hosts


# --- Who is there ------------------------------------------------------------------------------------------------


def _place(arguments: argparse.Namespace) -> tuple[str, int, int] | None:
    """Return coordinator's address, number of processes, and number of this one; None if it is the only one."""
    address, processes, process = (
        getattr(arguments, name) for name in ("coordinator_address", "num_processes", "process_id")
    )
    if processes == 1:
        return None
    if (address, processes, process) == (None, None, None):
        return _slice_place()
    if None in (address, processes, process):
        raise UserError("--coordinator_address, --num_processes and --process_id belong together; give all three")
    if process >= processes:
        raise UserError(f"--process_id {process} is not one of {processes} processes; they count from 0")
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]") or "?", int(port))
    except (OSError, ValueError) as error:
        raise UserError(f"--coordinator_address {address} is no HOST:PORT that can be found ({error})") from None
    return address, processes, process


def _slice_place() -> tuple[str, int, int] | None:
    """Return the place of this host on a TPU slice of several hosts, like `_place`; None elsewhere."""
    if os.environ.get("JAX_PLATFORMS", "tpu") == "cpu" or not accelerator.has_tpu():
        return None
    names = os.environ.get("TPU_WORKER_HOSTNAMES") or _metadata("worker-network-endpoints")
    hosts = [name.split(":")[-1] for name in names.split(",")]  # a name, or name:id:address
    if len(hosts) < 2:
        return None
    return f"{hosts[0]}:{PORT}", len(hosts), int(os.environ.get("TPU_WORKER_ID") or _metadata("agent-worker-number"))


def _metadata(name: str) -> str:
    """Return an entry of the metadata of a TPU VM; nothing where there is none."""
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:
        return ""


# --- What passes between the processes ---------------------------------------------------------------------------


def _client() -> Any:
    """Return jax's connection to process 0, which jax has no public name for."""
    from jax._src import distributed

    return distributed.global_state.client


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file, of a large file of weights that of its header and size; "missing" without it."""
    try:
        with open(file, "rb") as opened:
            if file.suffix != ".safetensors":
                return hashlib.sha256(opened.read()).hexdigest()
            header = opened.read(min(int.from_bytes(opened.read(8), "little"), 2**27))
            return hashlib.sha256(header + str(file.stat().st_size).encode()).hexdigest()
    except OSError:
        return "missing"


def sources() -> str:
    """Return a digest of the Python files that a stage runs."""
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("cogvideox/**/*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# --- The end -----------------------------------------------------------------------------------------------------


def _start_relay(process: int, scratch: Path) -> None:
    """Let lines on stderr begin with the process' number, and jax's report that another one died be one line.

    A program that ends after this one reads what comes, because jax ends this one when another has died; it also
    removes the folder `scratch`. What libraries print on stdout is thrown away. Only process 0's own lines and its
    progress bar go where they always go.
    """
    within_line = mmap.mmap(-1, 1)  # is shared with the program that copies lines
    if process == 0:
        sys.stdout, sys.stderr = (_OwnStream(stream, within_line) for stream in (sys.stdout, sys.stderr))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    reading, writing = os.pipe()
    if os.fork() == 0:
        with contextlib.suppress(BaseException):
            for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(ignored, signal.SIG_IGN)
            os.close(writing)
            with open(reading, errors="replace") as lines, open(2, "w", buffering=1, closefd=False) as out:
                relay(lines, out, process, Path(sys.argv[0]).name, within_line)
        shutil.rmtree(scratch, ignore_errors=True)
        os._exit(0)
    os.close(reading)
    os.dup2(writing, 2)
    os.close(writing)


class _OwnStream(io.TextIOWrapper):
    """A stream that goes where `stream` goes, whatever becomes of the descriptor.

    The first byte of `within_line` says whether the last text ended within a line, as a progress bar does.
    """

    def __init__(self, stream: Any, within_line: mmap.mmap):
        stream.flush()
        file = open(os.dup(stream.fileno()), "wb")  # noqa: SIM115  it stays open until the process ends
        super().__init__(file, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
        self._within_line = within_line

    def write(self, text: str) -> int:
        """Write text."""
        if text:
            self._within_line[0] = not text.endswith("\n")
        return super().write(text)


def relay(lines: IO[str], out: IO[str], process: int, program: str, within_line: mmap.mmap | bytearray) -> None:
    """Copy lines, each with the process' number before it, but make one line of jax's report that it must end.

    A line begins on a line of its own, also where `within_line`, see `_OwnStream`, says that a progress bar is drawn.
    """

    def write(text: str) -> None:
        if text and within_line[0]:
            text, within_line[0] = f"\n{text}", False
        print(text, end="", file=out, flush=True)

    report = ""  # of the service: some lines of its own log, which name the dead, and then all up to the end
    for line in lines:
        if report or re.match(r"[EF]\d{4} .*(coordination_service|client\.h)", line):
            report += line
        elif not re.match(r"[IW]\d{4} ", line):
            write(f"process {process}: {line}")
    write(f"process {process}: {program}: error: {why(report)}\n" if FATAL in report else report)


def why(report: str) -> str:
    """Return in one line why jax ended this process, from what it wrote about it."""
    if "RegisterTask" in report:
        return f"not all processes of the run came within {GATHERING_SECONDS} s; see what the others say"
    if "Failed to send RPC to coordination service" in report:
        return "process 0 has ended or cannot be reached, so this one ends too; see what process 0 says"
    dead = re.search(r"unhealthy \(stopped sending heartbeats\):\n(\d+(?:\n\d+)*)", report)
    if dead:
        gone = ", ".join(dead[1].split("\n"))
        return f"process {gone} has ended or cannot be reached, so this one ends too; see what it says"
    return "jax has lost the other processes: " + " ".join(report.split())[:500]
