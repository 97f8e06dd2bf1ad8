"""What tests of the gate share."""

from __future__ import annotations

from pathlib import Path

import pytest
from checked_repository import check, write


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with two cases and their baseline."""
    directory = tmp_path_factory.mktemp("repository")
    write(directory, first="build", second="build")
    ended = check(directory, "--update")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{directory}/memtrace-baseline.json written: 2 cases\n"
    return directory
