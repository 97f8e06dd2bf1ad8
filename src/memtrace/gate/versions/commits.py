"""The commits of a git repository, and their files in a directory of their own.

Nothing is changed in the repository: neither its files nor its index, branches or list of work trees, and none of its
hooks runs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from memtrace.errors import ConfigError, PlanError


def root_of(directory: Path) -> Path:
    """Returns the top directory of the repository that a directory is in.

    Raises:
        ConfigError: it is in none, or there is no git.
    """
    try:
        return Path(_git(directory, "rev-parse", "--show-toplevel"))
    except PlanError as error:
        raise ConfigError(f"{directory} is in no git repository: {error}; for releases give --package") from error


def commits(root: Path, good: str, bad: str) -> list[str]:
    """Returns the full names of the commits from one to the other, both among these, the oldest first.

    Where branches were merged, the line of first parents counts: a merge is one change.

    Raises:
        ConfigError: one of the two is no commit, they are the same, or neither is an ancestor of the other.
    """
    first, last = (_commit(root, name) for name in (good, bad))
    if first == last:
        raise ConfigError(f"--good and --bad must be two commits, got {good} and {bad}, which are {first[:12]}")
    if not _is_ancestor(root, first, last):
        first, last = last, first
        if not _is_ancestor(root, first, last):
            raise ConfigError(f"neither of {good} and {bad} is an ancestor of the other: no commits lie between them")
    line = _git(root, "rev-list", "--reverse", "--first-parent", f"{first}..{last}").splitlines()
    return [first, *line]


def described(root: Path, commit: str) -> str:
    """Returns the short name and the subject of a commit."""
    return _git(root, "log", "-1", "--format=%h %s", commit)


@contextmanager
def checked_out(root: Path, commit: str) -> Iterator[Path]:
    """Yields a directory with the files of a commit, which is removed afterwards. Submodules are empty in it.

    Raises:
        PlanError: git cannot write them.
    """
    with TemporaryDirectory(prefix="memtrace-") as place:
        files = Path(place) / "files"
        files.mkdir()
        own_index = {"GIT_INDEX_FILE": str(Path(place) / "index")}
        _git(root, "read-tree", commit, **own_index)
        _git(root, "checkout-index", "--all", f"--prefix={files}/", **own_index)
        yield files


def _commit(root: Path, name: str) -> str:
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except PlanError as error:
        raise ConfigError(f"{name} is no commit of {root}; for releases of a package give --package") from error


def _is_ancestor(root: Path, first: str, last: str) -> bool:
    command = ["git", "-C", str(root), "merge-base", "--is-ancestor", first, last]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _git(directory: Path, *arguments: str, **settings: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **settings},
        )
    except FileNotFoundError as error:
        raise ConfigError("git is not installed: commits cannot be compared without it") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise PlanError(f"git {arguments[0]}: {said[-1] if said else 'failed'}")
    return done.stdout.strip()
