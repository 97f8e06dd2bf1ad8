"""The script that makes sure that the Debian packages for the tests are there."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "debian-packages.sh"


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A directory to be the whole PATH: it has a shell and nothing that the script could look for."""
    for name in ("bash", "env"):
        program = shutil.which(name)
        assert program is not None
        (tmp_path / name).symlink_to(program)
    return tmp_path


def run_script(*needs: str, path: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *needs], env={**os.environ, "PATH": str(path)}, capture_output=True, text=True, check=False
    )


def put_program(directory: Path, name: str, body: str) -> None:
    program = directory / name
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)


def test_nothing_missing_is_silent() -> None:
    """On a machine that has everything the script succeeds without a word."""
    done = run_script("compiler", "prometheus", "alertmanager", "chromium", path=os.environ["PATH"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_who_is_not_root_is_told_what_to_install(bare_path: Path) -> None:
    """Without root the script names what is missing and the command that installs it."""
    put_program(bare_path, "id", "echo 1000")
    done = run_script("prometheus", "chromium", path=bare_path)
    assert done.returncode == 1
    assert "missing on this machine: prometheus chromium" in done.stderr
    assert "apt-get install --no-install-recommends prometheus chromium" in done.stderr


def test_a_program_that_is_half_there_is_missing(bare_path: Path) -> None:
    """A Prometheus without promtool is not enough."""
    put_program(bare_path, "id", "echo 1000")
    put_program(bare_path, "prometheus", "true")
    assert "missing on this machine: prometheus\n" in run_script("prometheus", path=bare_path).stderr


def test_unknown_need_is_an_error() -> None:
    """A word that is not in the script's table fails instead of passing for something that is there."""
    done = run_script("prometeus", path=os.environ["PATH"])
    assert done.returncode == 2
    assert "unknown need 'prometeus'" in done.stderr
