"""Save compiled programs to a file (python -m compile_for_tpu ... --save), and load them in a stage.

The file begins with one line of JSON that describes the programs; a stage uses them only if every entry is the same as
for the programs that it would compile itself. The file is code, to be trusted like a program: jax unpickles what it
has serialized, and runs it. Nothing else of the file is unpickled.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.extend import core

from cogvideox.errors import UserError
from cogvideox.files.names import ROOT
from cogvideox.versions import versions

SOURCES = sorted([*ROOT.glob("cogvideox/models/**/*.py"), ROOT / "custom_splash_attention.py"])
# Libraries whose code is in the programs, or compiles them.
LIBRARIES = ("jax", "jaxlib", "libtpu", "diffusers", "torchax", "flax")

# The parts of a jaxpr's text that name the mesh which was set while it was traced, and the hardware of its meshes. They
# are left out of the digest: a stage sets no mesh, and the entry "devices" of the description names the hardware.
MESH_CONTEXT = re.compile(
    r"context_mesh=\w+(?:\((?:[^()]|\([^()]*\))*\))?|, device_kind=[^,]*, num_cores=[^,]*, platform=\w+"
)

LONGEST_HEADER = 2**20  # bytes


class Mismatch(Exception):
    """The programs in a file are not the wanted ones; the message says in which entry they differ."""


def description(what: str, devices: Sequence[jax.Device], traced: Sequence[jax.stages.Traced], options: dict) -> dict:
    """Return a description that is the same for equal compiled programs, as a dict that JSON can hold.

    Args:
        what: the programs' name, such as "denoising step".
        devices: the devices that the programs run on.
        traced: the programs before compilation. The description has a digest of their arguments' shapes and one of
            their operations, in which numbers from a model's config are included.
        options: all other options that the programs depend on.
    """
    arguments = [str(leaf) for program in traced for leaf in jax.tree.leaves(program.in_avals)]
    return {
        "program": what,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "device numbers": sorted(device.id for device in devices),  # others, if several processes share a CPU
        "options": {name: str(value) for name, value in options.items()},
        "argument shapes": hashlib.sha256(json.dumps(arguments).encode()).hexdigest(),
        "versions": versions(*LIBRARIES),
        "operations": operations_digest(traced),
        "source files": hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest(),
    }


def operations_digest(traced: Sequence[jax.stages.Traced]) -> str:
    """Return the SHA-256 of the operations of traced programs and of the constants in them.

    The digest is the same in every process and working directory, because the text of a jaxpr has no source locations.
    The text of a lowered program has some: a Pallas kernel in it names its source files. For CogVideoX1.5-5B the
    function takes 0.3 seconds for the denoising step and 2 seconds for a decoder.
    """
    digest = hashlib.sha256()
    for program in traced:
        text = " ".join(str(program.jaxpr).split())
        digest.update(MESH_CONTEXT.sub("", text).encode())
        for constant in _constants(program.jaxpr):
            digest.update(np.asarray(constant).tobytes())
    return digest.hexdigest()


def _constants(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> Iterator:
    """Yield the constant arrays of a jaxpr and of the jaxprs inside it; its text has only their shapes."""
    yield from getattr(jaxpr, "consts", ())
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(value, "eqns"):
                yield from _constants(value)


def save(path: str, programs: Sequence[jax.stages.Compiled], made_for: dict) -> None:
    """Write compiled programs and their description to `path`."""
    parts = [serialize_executable.serialize(program)[0] for program in programs]
    payload = b"".join(parts)
    header = made_for | {"sizes": [*map(len, parts)], "payload": hashlib.sha256(payload).hexdigest()}
    Path(path).write_bytes(json.dumps(header).encode() + b"\n" + payload)


def load(
    path: Path, wanted: dict, devices: Sequence[jax.Device], traced: Sequence[jax.stages.Traced]
) -> list[jax.stages.Compiled]:
    """Load the programs in a file that `save` wrote, to run on `devices`, as the compiled `traced`.

    Raises:
        Mismatch: the description in the file is not `wanted`.
        UserError: the file cannot be read, `save` did not write it, or it is cut.
    """
    try:
        with open(path, "rb") as file:
            made_for = json.loads(file.readline(LONGEST_HEADER))
            payload = file.read()
        if not isinstance(made_for, dict):
            raise TypeError("a header is an object")
    except OSError as error:
        raise UserError(f"cannot read --executable {path}: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--executable {path} was not written by python -m compile_for_tpu ... --save") from error
    for name, value in wanted.items():
        if made_for.get(name) != value:
            digest = isinstance(value, str) and len(value) == 64
            raise Mismatch(f"it was made for other {name}" + ("" if digest else f": {made_for.get(name)}, not {value}"))
    sizes = made_for.get("sizes", [])  # a file of an earlier version has none
    if made_for.get("payload") != hashlib.sha256(payload).hexdigest() or len(sizes) != len(traced):
        raise UserError(
            f"--executable {path} is cut or damaged; make it again with python -m compile_for_tpu ... --save"
        )
    return [
        serialize_executable.deserialize_and_load(
            payload[end - size : end],
            jax.tree.structure(program.args_info),
            program.out_tree,
            execution_devices=list(devices),
        )
        for program, size, end in zip(traced, sizes, itertools.accumulate(sizes), strict=True)
    ]
