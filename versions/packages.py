"""Runs the tests of what the development environment does without: `make test-packages`.

Optimizers and quantised layers of packages that few have all of. Their tests are rows of tables in which only those
stand whose packages are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from os import environ
from pathlib import Path

from versions.environments import ROOT, VARIABLES, environment
from versions.rows import PACKAGES

BESIDE = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2", "bitsandbytes==0.50.2")
"""What the packages are installed beside: as in the development environment."""
OPTIMIZERS = (
    "galore_torch==1.0",
    "apollo_torch==1.0.3",
    "lomo_optim==0.1.1",
    "grokadamw==0.1.2",
    "torch-optimi==0.3.3",
    "torchao==0.18.0",
)
LAYERS = ("hqq==0.2.8.post1", "gptqmodel==7.7.0", "optimum-quanto==0.2.7", "torchao==0.18.0")
IMPORTED = ("termcolor", "logbar", "tokenicer", "device-smi", "random-word", "pypcre", "defuser", "ninja")
"""What of their needs the tests import, or compile with."""
TESTS = {
    "tests/engines/test_quantised_layers.py": "",
    "tests/adapters/test_trainer_configurations.py": "test_trains_as_without_memtrace and optim",
}
"""Files, and which of their tests, as `pytest -k` has it; all without."""


def main() -> int:
    """Makes the environment where it is not there, and returns 1 where a test has failed."""
    parser = argparse.ArgumentParser(prog="python -m versions.packages", description=__doc__)
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-versions", help="where it is kept")
    arguments = parser.parse_args()
    alone = dict.fromkeys((*OPTIMIZERS, *LAYERS, *IMPORTED))
    python = environment(arguments.environments.absolute() / "packages", (*BESIDE, *PACKAGES), alone=alone)
    failed = 0
    for tests, which in TESTS.items():
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, *(["-k", which] if which else [])]
        failed |= subprocess.run(command, cwd=ROOT, env={**environ, **VARIABLES}, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
