"""Who imports whom, where import-linter (`make lint`) does not see it: at the root, and from file to file.

Imports count wherever they are in a file: inside functions and under TYPE_CHECKING too.
"""

import ast
import functools
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT, STAGE1, STAGE2, STAGE3, STAGE3_FLAX

STAGES = (STAGE1, STAGE2, STAGE3, STAGE3_FLAX)
KERNEL = "custom_splash_attention.py"
SCRIPTS = {*STAGES, KERNEL, "inspect_tensors.py", "utils.py"}
FOLDERS = ("benchmarks", "cogvideox", "compile_for_tpu", "fleet", "tools")


def name_of(file: Path) -> str:
    """Return the name under which a file of the project is imported."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    """Return all files of the project but those of the tests, by the names under which they are imported."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    return {name_of(file): file for file in files}


def imported(text: str) -> Iterator[str]:
    """Yield the modules of the project that Python code imports, anywhere in it."""
    for node in ast.walk(ast.parse(text)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else node.module for name in inside]
        yield from (name for name in names if name in modules())


@functools.cache
def graph() -> dict[str, set[str]]:
    """Return the modules that each module imports."""
    return {name: set(imported(file.read_text())) for name, file in modules().items()}


def scripts(*files: str) -> set[str]:
    """Return the names of modules at the root."""
    return {file.removesuffix(".py") for file in files}


def patches_arguments(text: str) -> bool:
    """Return whether Python code replaces sys.argv."""
    nodes = [*ast.walk(ast.parse(text))]
    assigned = any(isinstance(x, ast.Attribute) and x.attr == "argv" and isinstance(x.ctx, ast.Store) for x in nodes)
    return assigned or any(isinstance(x, ast.Constant) and x.value in ("argv", "sys.argv") for x in nodes)


def test_the_root_has_seven_scripts():
    assert {file.name for file in ROOT.glob("*.py")} <= SCRIPTS


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_uses_the_package_and_utils(stage):
    """But for the script of the Flax decoder, which is stage 3 with another default."""
    (name,) = scripts(stage)
    others = {module for module in graph()[name] if module.partition(".")[0] != "cogvideox"}
    assert others == scripts(STAGE3 if stage == STAGE3_FLAX else "utils.py")


def test_nothing_imports_a_stage():
    found = {(name, other) for name, others in graph().items() for other in others & scripts(*STAGES)}
    assert found <= {(*scripts(STAGE3_FLAX), *scripts(STAGE3))}


def test_the_kernel_stands_alone():
    (kernel,) = scripts(KERNEL)
    assert not graph()[kernel]
    users = {name for name, others in graph().items() if kernel in others}
    assert users and all(name.startswith("cogvideox.models.") for name in users), users


def test_no_circle_of_files():
    assert len(graph()) > 80 and sum(map(len, graph().values())) > 300
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("folder", ["", *FOLDERS, "tests"])
def test_nobody_patches_the_command_line(folder):
    """Each program's main takes the arguments."""
    files = [file for file in (ROOT / folder).glob("**/*.py" if folder else "*.py") if file != Path(__file__)]
    assert files and not [file.name for file in files if patches_arguments(file.read_text())]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f():\n    from cogvideox.files import checkpoint", {"cogvideox.files.checkpoint"}),
        ("if TYPE_CHECKING:\n    from cogvideox.errors import UserError", {"cogvideox.errors"}),
        ("import utils, os", {"utils"}),
    ],
)
def test_imports_are_seen(text, found):
    assert set(imported(text)) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sys.argv = ['a']", True),
        ("saved, sys.argv = sys.argv, ['a']", True),
        ("monkeypatch.setattr(sys, 'argv', [])", True),
        ("monkeypatch.setattr('sys.argv', [])", True),
        ("print(sys.argv[1:])", False),
    ],
)
def test_patches_are_seen(text, found):
    assert patches_arguments(text) == found
