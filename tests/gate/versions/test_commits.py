"""Commits of a repository and their files, which leave the repository as it was."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from memtrace.errors import ConfigError
from memtrace.gate.versions.commits import checked_out, commits, described, root_of


def git(root: Path, *arguments: str) -> str:
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    command = ["git", "-C", str(root), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three commits on main, the last one a merge; a file that is changed and not committed; a hook that fails."""
    root = tmp_path / "repository"
    (root / "inner").mkdir(parents=True)
    git(tmp_path, "init", "--quiet", "--initial-branch=main", str(root))
    for number in ("one", "two"):
        (root / "inner" / "file").write_text(number)
        git(root, "add", ".")
        git(root, "commit", "--quiet", "--message", number)
    git(root, "checkout", "--quiet", "-b", "side", "main~1")
    (root / "other").write_text("side")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "side")
    git(root, "checkout", "--quiet", "main")
    git(root, "merge", "--quiet", "--no-ff", "--message", "merged", "side")
    (root / "inner" / "file").write_text("not committed")
    hook = root / ".git" / "hooks" / "post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    return root


def state(root: Path) -> list[str]:
    seen = [
        git(root, *words.split()) for words in ("status --porcelain", "worktree list", "branch --list", "stash list")
    ]
    files = [path for path in (root / ".git").rglob("*") if path.is_file() and path.name != "index"]
    return [*seen, *sorted(str(path) for path in files), (root / "inner" / "file").read_text()]


def test_files_of_a_commit_lie_elsewhere_and_the_repository_is_as_before(repository: Path) -> None:
    before = state(repository)
    line = commits(repository, "main~2", "main")
    assert [described(repository, one).split(" ", 1)[1] for one in line] == ["one", "two", "merged"]
    assert commits(repository, "main", "main~2") == line
    contents = []
    for one in line:
        with checked_out(repository, one) as files:
            contents.append(
                {str(path.relative_to(files)): path.read_text() for path in files.rglob("*") if path.is_file()}
            )
        assert not files.exists()
    merged = {"inner/file": "two", "other": "side"}
    assert contents == [{"inner/file": "one"}, {"inner/file": "two"}, merged]
    assert state(repository) == before


def test_what_are_no_two_commits_in_a_line_is_told(repository: Path, tmp_path: Path) -> None:
    assert root_of(repository / "inner") == repository
    with pytest.raises(ConfigError, match="is in no git repository"):
        root_of(tmp_path)
    with pytest.raises(ConfigError, match=r"4\.50\.0 is no commit of .*--package"):
        commits(repository, "4.50.0", "main")
    with pytest.raises(ConfigError, match="--oneline is no commit"):
        commits(repository, "--oneline", "main")
    with pytest.raises(ConfigError, match="two commits"):
        commits(repository, "main", "HEAD")
    with pytest.raises(ConfigError, match="neither of side and main~1 is an ancestor"):
        commits(repository, "side", "main~1")
