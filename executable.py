"""Compiled programs in a file: written once (python -m compile_for_tpu ... --save), loaded by a stage afterwards.

The file begins with one line of JSON that says what the programs were made for; a stage uses them only if every entry
is what it would compile itself. Loading runs code from the file (pickle), so take such files only from yourself.
"""

import hashlib
import importlib.metadata
import json
import pickle
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import serialize_executable

from console import Report, UserError

SOURCES = sorted(
    [*Path(__file__).parent.glob("models/*.py"), *Path(__file__).parent.glob("custom_splash_attention.py")]
)
# The libraries whose code is in the programs, or makes them.
LIBRARIES = ("jax", "jaxlib", "libtpu", "diffusers", "torchax", "flax")

# What a jaxpr's text says of the mesh that was set while it was traced, and of the hardware of its meshes. A stage sets
# none, and "devices" in the description names the hardware.
MESH_CONTEXT = re.compile(
    r"context_mesh=\w+(?:\((?:[^()]|\([^()]*\))*\))?|, device_kind=[^,]*, num_cores=[^,]*, platform=\w+"
)


class Mismatch(Exception):
    """The programs in a file are not the ones that are wanted; the message says in what."""


def description(what: str, devices: Sequence[jax.Device], traced: Sequence[jax.stages.Traced], options: dict) -> dict:
    """Return what makes compiled programs the right ones: a dict that JSON can hold.

    Args:
        what: their name, such as "denoising step".
        traced: the programs before compilation. Their arguments' shapes count, and all that they compute: numbers from
            a model's config that change no shape are in the digest of "operations".
        options: whatever else they depend on.
    """
    arguments = [str(leaf) for program in traced for leaf in jax.tree.leaves(program.in_avals)]
    return {
        "program": what,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "options": {name: str(value) for name, value in options.items()},
        "argument shapes": hashlib.sha256(json.dumps(arguments).encode()).hexdigest(),
        "versions": versions(*LIBRARIES),
        "operations": operations_digest(traced),
        "source files": hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest(),
    }


def versions(*names: str) -> dict[str, str]:
    """Return the versions of libraries by name; libtpu, for one, is not installed everywhere."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def operations_digest(traced: Sequence[jax.stages.Traced]) -> str:
    """Return the SHA-256 of all that traced programs compute: their operations and the constants in them.

    It is the same in every process and working directory: the text of a jaxpr holds no source locations. Lowered text
    would not do, because a Pallas kernel in it holds the paths of its source files. For CogVideoX1.5-5B it takes
    0.3 seconds for the denoising step and 2 seconds for a decoder.
    """
    digest = hashlib.sha256()
    for program in traced:
        text = " ".join(str(program.jaxpr).split())
        digest.update(MESH_CONTEXT.sub("", text).encode())
        for constant in _constants(program.jaxpr):
            digest.update(np.asarray(constant).tobytes())
    return digest.hexdigest()


def _constants(jaxpr) -> Iterator:
    """Yield the arrays that a jaxpr and those inside it were closed over; the text names only their shapes."""
    yield from getattr(jaxpr, "consts", ())
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(value, "eqns"):
                yield from _constants(value)


def compile_or_load(
    path: Path | None,
    what: str,
    devices: Sequence[jax.Device],
    traced: Sequence[jax.stages.Traced],
    options: dict,
    report: Report,
) -> list[jax.stages.Compiled]:
    """Return the programs of the file `path` if they are the right ones, else `traced` compiled; says which.

    See `description` for the arguments; raises UserError if `path` is given and is no such file, and if the programs
    do not fit the memory of a chip.
    """
    if path is not None:
        try:
            programs = load(path, description(what, devices, traced, options), devices)
            report.say(f"loaded the {what} from {path}")
            return programs
        except Mismatch as mismatch:
            report.say(f"WARNING: {path} does not fit, compiling instead: {mismatch}")
    try:
        with ThreadPoolExecutor() as pool:
            programs = list(pool.map(lambda program: program.lower().compile(), traced))
    except jax.errors.JaxRuntimeError as error:
        if shortage := memory_shortage(str(error)):
            needed, there = shortage
            raise UserError(
                f"the {what} needs {needed:.1f} GiB of a chip's {there:.2f} GiB of memory; "
                "use a slice of more chips, or make a smaller video"
            ) from None
        raise
    report.say(f"compiled the {what}")
    return programs


def memory_shortage(message: str) -> tuple[float, float] | None:
    """GiB that a program needs and that a TPU chip has, if that is what the compiler's error message is about."""
    match = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", message) or re.search(
        r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", message
    )
    return (float(match[1]), float(match[2])) if match else None


def save(path: str, programs: Sequence[jax.stages.Compiled], made_for: dict) -> None:
    """Write compiled programs and their description to `path`."""
    payload = pickle.dumps([serialize_executable.serialize(program) for program in programs])
    Path(path).write_bytes(json.dumps(made_for).encode() + b"\n" + payload)


def load(path: Path, wanted: dict, devices: Sequence[jax.Device]) -> list[jax.stages.Compiled]:
    """Read the programs of a file written by `save` back for `devices`.

    Raises:
        Mismatch: they were made for something else than `wanted`.
        UserError: there is no such file, or it is not one of ours.
    """
    try:
        header, _, payload = path.read_bytes().partition(b"\n")
        made_for = json.loads(header)
    except OSError as error:
        raise UserError(f"cannot read --executable {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--executable {path} was not written by python -m compile_for_tpu ... --save") from error
    for name, value in wanted.items():
        if made_for.get(name) != value:
            digest = isinstance(value, str) and len(value) == 64
            raise Mismatch(f"it was made for other {name}" + ("" if digest else f": {made_for.get(name)}, not {value}"))
    return [
        serialize_executable.deserialize_and_load(*program, execution_devices=list(devices))
        for program in pickle.loads(payload)
    ]
