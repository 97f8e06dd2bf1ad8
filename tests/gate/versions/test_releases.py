"""Releases of packages in a directory, and environments that hold them."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from gate.versions.wheels import write_wheel

from memtrace.errors import ConfigError, OutputError, PlanError
from memtrace.gate.versions.environments import Environments, cache_directory
from memtrace.gate.versions.releases import Index, between, releases


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """A directory with releases of `weights`, which needs `parts` and something that is installed here."""
    wheels = tmp_path / "wheels"
    for number in ("1.9.0", "1.10.0", "2.0.0rc1", "2.0.0"):
        requires = ["parts>=1", f"pytest=={version('pytest')}"]
        write_wheel(wheels, "weights", number, f"VERSION = '{number}'\n", requires)
    write_wheel(wheels, "parts", "1.2", "")
    write_wheel(wheels, "parts", "0.9", "")
    return Index(find_links=(str(wheels),), none=True)


def test_releases_come_in_their_order_without_those_before_a_release(index: Index) -> None:
    """Both ends are among those between them, whichever is named first."""
    known = releases("weights", index)
    assert known == ["1.9.0", "1.10.0", "2.0.0"]
    assert between(known, "2.0.0", "1.10.0", "weights") == ["1.10.0", "2.0.0"]


def test_what_is_no_package_or_release_is_told(index: Index) -> None:
    with pytest.raises(ConfigError, match="releases of nothing-of-it are not known: pip index: No matching"):
        releases("nothing-of-it", index)
    with pytest.raises(ConfigError, match="must be the name of a package"):
        releases("--help", index)
    with pytest.raises(ConfigError, match=r"has no release 1\.11\.0 here: there are, among others, 1\.9\.0, 1\.10\.0"):
        between(["1.9.0", "1.10.0", "2.0.0"], "1.11.0", "2.0.0", "weights")
    with pytest.raises(ConfigError, match="two releases"):
        between(["1.9.0", "1.10.0"], "1.9.0", "1.9.0", "weights")


def test_a_python_without_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho $0: No module named pip >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(ConfigError, match="has no pip, which lists and installs releases: python -m ensurepip"):
        releases("weights", Index())


def test_every_place_of_packages_reaches_pip() -> None:
    index = Index(url="https://a", extra_urls=("https://b", "https://c"), find_links=("d",), none=True)
    expected = "--index-url https://a --extra-index-url https://b --extra-index-url https://c --find-links d --no-index"
    assert " ".join(index.options) == expected


def test_an_environment_has_the_release_and_what_is_missing_here(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is installed is not installed again. It is made once, and what was begun before is removed."""
    kept = tmp_path / "kept"
    (kept / "draft-of-a-killed-process").mkdir(parents=True)
    environments = Environments(directory=kept, index=index)
    path = environments.path_of("weights", "1.10.0")
    assert (path / "weights.py").read_text() == "VERSION = '1.10.0'\n"
    assert {one.name for one in path.glob("*.dist-info")} == {"weights-1.10.0.dist-info", "parts-1.2.dist-info"}
    assert sorted(one.name for one in kept.iterdir()) == sorted(["lock", path.name])
    shutil.rmtree(tmp_path / "wheels")
    assert environments.path_of("weights", "1.10.0") == path
    with pytest.raises(PlanError, match=r"pip install: No matching distribution found for weights==2\.0\.0"):
        environments.path_of("weights", "2.0.0")
    assert sorted(one.name for one in kept.iterdir()) == sorted(["lock", path.name])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "memtrace"


def test_requirements_beside_a_release_are_installed_with_it(index: Index, tmp_path: Path) -> None:
    environments = Environments(directory=tmp_path / "kept", index=index, beside=("parts==0.9",))
    with pytest.raises(PlanError, match="pip install"):  # the release needs a newer one
        environments.path_of("weights", "2.0.0")
    newer = Environments(directory=tmp_path / "kept", index=index, beside=("parts==1.2",))
    assert (newer.path_of("weights", "2.0.0") / "parts-1.2.dist-info").is_dir()


def test_a_directory_that_cannot_be_written_is_told(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be kept in .*--cache"):
        Environments(directory=tmp_path / "file", index=index).path_of("weights", "2.0.0")
