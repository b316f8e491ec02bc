"""Join a Ray cluster, or start one of this machine alone for as long as it is needed."""

import contextlib
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator

from cogvideox.errors import UserError, first_line, reason
from cogvideox.files.names import ROOT
from cogvideox.run import accelerator
from cogvideox.signals import SIGNALS, Interruption
from fleet.places import ON_CPU

ADDRESS = re.compile(r"[^/]+:\d{1,5}")  # of a Ray head
ANSWER_SECONDS = 15.0  # in which a head must answer
STORE_BYTES = 128 * 2**20  # of Ray's object store: what passes here are words and seconds

# Ray asks the first time whether it may report how it is used, and warns of a change of a later version.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "0"}


@contextlib.contextmanager
def joined(address: str | None) -> Iterator[str]:
    """Be a driver of the cluster in the body of a `with` statement; yield the address of its dashboard, if it has one.

    Args:
        address: of the cluster, such as "auto" or "HOST:6379"; None to start one of this machine, which ends with the
            body, or with this process.

    Raises:
        UserError: there is no such cluster, or none can be started.
    """
    if address and ADDRESS.fullmatch(address):
        _check_answer(address)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    # When a machine dies, Ray prints a page of its log, and has no switch for it. The file is in its folder of logs.
    ray._private.worker.print_to_stdstream = lambda *_, **__: None
    own = {} if address else _own_cluster()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        context = ray.init(
            address or "local",
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            **own,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        what = f"cannot join the Ray cluster at --address {address}" if address else "cannot start Ray"
        why = first_line(error).partition(". ")[0].rstrip(".")
        raise UserError(f"{what}: {why}; docs/fleet.md has the commands") from error
    try:
        for number in SIGNALS:  # Ray has taken SIGTERM
            signal.signal(number, Interruption.receive)
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


def _check_answer(address: str) -> None:
    """Raise UserError if nobody answers at HOST:PORT; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"nobody answers at --address {address} ({reason(error)}); is it what `ray start --head` printed, and does "
            "Ray run there?"
        ) from error


def _own_cluster() -> dict:
    """Return how Ray is started on this machine: where there are no chips, a CPU makes one video at a time."""
    has_gpu = os.path.exists("/dev/nvidia0") and os.environ.get("JAX_PLATFORMS", "") != "cpu"
    resources = {} if has_gpu or accelerator.has_tpu() else {ON_CPU: 1}
    return {"resources": resources, "object_store_memory": STORE_BYTES} | ({} if has_gpu else {"num_gpus": 0})
