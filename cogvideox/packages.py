"""Say in one line that a package of requirements.txt is missing, and which command installs it."""

import importlib.util
import os
import re
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
ENVIRONMENT = REQUIREMENTS.with_name(".venv")  # that README's commands make
BASE = ("numpy", "pydantic", "safetensors", "tqdm", "ml_dtypes")  # what every program imports before anything else


def end_without_base() -> None:
    """End the process with exit status 2 and a line on stderr if a package of BASE is missing."""
    for name in BASE:
        if importlib.util.find_spec(name) is None:
            print(f"error: {missing(name)}", file=sys.stderr)
            sys.exit(2)


def is_required(module: str) -> bool:
    """Return whether a module is in a package of requirements.txt."""
    packages = re.findall(r"^[\w-]+", REQUIREMENTS.read_text(), re.MULTILINE)
    return module.partition(".")[0] in {package.replace("-", "_") for package in packages}


def missing(module: str, requirements: Path = REQUIREMENTS) -> str:
    """Say that the Python that runs does not have a module of these requirements, and what helps."""
    install = f"{sys.executable} -m pip install -r {os.path.relpath(requirements)}"
    line = f"the package {module.partition('.')[0]} is not installed for {sys.executable}; install it with {install}"
    python = ENVIRONMENT / "bin" / "python"
    is_other = python.exists() and Path(sys.prefix) != ENVIRONMENT
    return f"{line}, or run {os.path.relpath(python)}" if is_other else line
