"""Releases of packages in a directory, and environments that hold them."""

from __future__ import annotations

import errno
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from gate.versions.wheels import write_wheel

from memtrace.errors import ConfigError, OutputError, PlanError
from memtrace.gate.versions.environments import Environments, cache_directory
from memtrace.gate.versions.releases import Index, between, releases
from memtrace.record.units import format_bytes


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


def test_builds_of_a_release_are_one_release(tmp_path: Path) -> None:
    """Such as torch's for a CPU beside the usual ones: pip chooses, and either name may be given."""
    for number in ("2.13.0", "2.13.0+cpu", "2.14.1+cpu"):
        write_wheel(tmp_path, "weights", number, "")
    known = releases("weights", Index(find_links=(str(tmp_path),), none=True))
    assert known == ["2.13.0", "2.14.1"]
    assert between(known, "2.13.0+cpu", "2.14.1", "weights") == known


def python_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """Puts a shell in the place of Python, for what pip cannot be made to do here."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))


def test_large_downloads_are_told_as_they_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their sizes, by pip's own words; small ones, and what is in its cache, are not."""
    lines = ("Downloading a-1.whl.metadata (29 kB)", "  Downloading https://x/b-1.whl (899.8 MB)")
    lines += ("  Using cached c-1.whl (700.0 MB)", "Downloading d-1.whl (9.1 MB)")
    printed = "; ".join(f"echo '{line}'" for line in lines)
    python_that(tmp_path, monkeypatch, f'{printed}; echo "$TMPDIR"; echo ERROR: enough >&2; exit 1')
    said: list[str] = []
    environments = Environments(directory=tmp_path / "kept", index=Index(), say=said.append)
    with pytest.raises(PlanError, match="pip install: enough"):
        environments.path_of("weights", "1.0")
    assert said == ["downloading b-1.whl, 899.8 MB"]


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_disk_ends_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: int) -> None:
    """Or a quota: it is no fault of the release, which would be skipped, and another tried that fills it again."""
    said = os.strerror(full)
    complaint = f"ERROR: Could not install packages due to an OSError: [Errno {full}] {said}"
    python_that(tmp_path, monkeypatch, f"echo '{complaint}' >&2; exit 1")
    with pytest.raises(OutputError, match=rf"{said}; make room, or name .* with --cache"):
        Environments(directory=tmp_path / "kept", index=Index()).path_of("weights", "1.0")
    assert [one.name for one in (tmp_path / "kept").iterdir()] == ["lock"]


def test_what_is_built_for_a_release_of_torch_comes_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers imports torchvision where it is installed, and that of another torch cannot be imported."""
    python_that(tmp_path, monkeypatch, 'echo ERROR: "$@" >&2; exit 1')
    environments = Environments(directory=tmp_path / "kept", index=Index(none=True))
    monkeypatch.setattr("memtrace.gate.versions.environments.installed", lambda: ["torch==2.13.0", "torchvision==0.28"])
    with pytest.raises(PlanError, match=r"--no-index torch==2\.14\.1 torchvision$"):
        environments.path_of("torch", "2.14.1")
    with pytest.raises(PlanError, match=r"--no-index peft==0\.19\.0$"):
        environments.path_of("peft", "0.19.0")


def test_a_large_release_is_told_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    write_wheel(wheels, "weights", "1.0", "", ["parts"])
    write_wheel(wheels, "parts", "1.2", "# " + "x" * 2000)
    monkeypatch.setattr("memtrace.gate.versions.environments.LARGE", 2000)
    said: list[str] = []
    index = Index(find_links=(str(wheels),), none=True)
    path = Environments(directory=tmp_path / "kept", index=index, say=said.append).path_of("weights", "1.0")
    (line,) = said
    nbytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert line == f"weights 1.0 with 1 other package takes {format_bytes(nbytes)} in {path}"


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
    python_that(tmp_path, monkeypatch, "echo $0: No module named pip >&2; exit 1")
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
    with pytest.raises(
        PlanError, match=r"pip install: .*conflicting dependencies.*weights 2\.0\.0 depends on parts>=1"
    ):
        environments.path_of("weights", "2.0.0")
    newer = Environments(directory=tmp_path / "kept", index=index, beside=("parts==1.2",))
    assert (newer.path_of("weights", "2.0.0") / "parts-1.2.dist-info").is_dir()


def test_a_directory_that_cannot_be_written_is_told(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot be kept in .*--cache"):
        Environments(directory=tmp_path / "file", index=index).path_of("weights", "2.0.0")
