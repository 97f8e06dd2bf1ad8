"""Virtual environments of their own, in which the pins of the development environment do not hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "KINETO_LOG_LEVEL": "6",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What is set for whatever runs in an environment: memtrace is the one of this tree."""


def environment(directory: Path, wanted: Iterable[str], *, alone: Iterable[str] = ()) -> Path:
    """Returns the Python of an environment, which is made where it is not there; 1 to 6 GB.

    Args:
        directory: where it is.
        wanted: what pip installs, with all that this needs.
        alone: what pip installs without what this needs, after the others.

    Raises:
        CalledProcessError: pip cannot install it. The environment stays as it is then, and is to be removed.
    """
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        variables = {**os.environ, "PIP_CONSTRAINT": "", "DS_BUILD_OPS": "0"}
        subprocess.run([*install, *wanted], check=True, env=variables)
        if alone := [*alone]:
            subprocess.run([*install, "--no-deps", *alone], check=True, env=variables)
    return python


def installed(python: Path, packages: Iterable[str]) -> dict[str, str | None]:
    """Returns the version of each package that an environment has, without what a build adds to it (`+cpu`).

    None stands for one that is not there.
    """
    code = """
import json, sys
from importlib.metadata import PackageNotFoundError, version

def found(name):
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None

print(json.dumps({name: found(name) for name in sys.argv[1:]}))
"""
    output = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout
    versions: dict[str, str | None] = json.loads(output)
    return versions


def version_of(python: Path) -> str:
    """Returns the version of an interpreter."""
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
