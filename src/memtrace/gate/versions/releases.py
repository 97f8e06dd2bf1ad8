"""The releases of a package on an index, asked of pip."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

from memtrace.errors import ConfigError, OutputError, PlanError

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a disk says that takes no more, or no more of this user's."""
_LISTED = re.compile(r"^Available versions: (.+)$", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Where packages come from, beside what pip's own settings and environment variables say."""

    url: str | None = None
    """Address of the index in place of pip's."""
    extra_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    """Directories or pages with packages."""
    none: bool = False
    """Whether no index is asked: packages come from `find_links` alone."""

    @property
    def options(self) -> list[str]:
        """The same as options of pip."""
        options = [] if self.url is None else ["--index-url", self.url]
        options += [option for url in self.extra_urls for option in ("--extra-index-url", url)]
        options += [option for place in self.find_links for option in ("--find-links", place)]
        return [*options, "--no-index"] if self.none else options


def pip(*arguments: str, heard: Callable[[str], None] = lambda _: None, scratch: Path | None = None) -> str:
    """Returns what a command of this interpreter's pip printed.

    Args:
        arguments: the command and its options.
        heard: called with each line as it is printed.
        scratch: where pip unpacks before it installs; None for the system's directory, which may be too small for it.

    Raises:
        ConfigError: there is no pip.
        OutputError: the disk is full, or the user's share of it.
        PlanError: pip failed; the message is its own.
    """
    settings = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off"}
    if scratch is not None:
        settings["TMPDIR"] = str(scratch)
    command, printed = [sys.executable, "-m", "pip", *arguments], []
    with (
        TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env={**os.environ, **settings}
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            heard(line.strip())
        status = process.wait()
        errors.seek(0)
        complaints = errors.read()
    if "No module named pip" in complaints:
        raise ConfigError(f"{sys.executable} has no pip, which lists and installs releases: python -m ensurepip")
    if status:
        message = f"pip {arguments[0]}: {_complaint(complaints, printed)}"
        if any(os.strerror(full) in complaints for full in _FULL):
            raise OutputError(f"{message}; make room, or name a directory on another disk with --cache")
        raise PlanError(message)
    return "".join(printed)


def _complaint(complaints: str, printed: Sequence[str]) -> str:
    """Returns what pip found wrong, in a line: its last error, or whose requirements do not go together."""
    errors = [line.removeprefix("ERROR: ") for line in complaints.splitlines() if line.startswith("ERROR: ")]
    said = [line for line in errors if not line.startswith("ResolutionImpossible")] or complaints.splitlines()
    causes = [line.strip() for line in printed if line.startswith("    ") and " depends on " in line]
    return "; ".join([said[-1] if said else "failed", *causes])


def releases(package: str, index: Index) -> list[str]:
    """Returns the releases of a package that this interpreter can install, the oldest first, without pre-releases.

    Builds of one release (`2.13.0`, `2.13.0+cpu`) are one: pip chooses among them. Asks the index once.

    Raises:
        ConfigError: the name is none, the index does not know it, or there is no pip.
    """
    if not _NAME.fullmatch(package):
        raise ConfigError(f"--package must be the name of a package, such as transformers, got {package!r}")
    try:
        printed = pip("index", "versions", package, *index.options)
    except PlanError as error:
        raise ConfigError(f"the releases of {package} are not known: {error}") from error
    found = _LISTED.search(printed)
    if found is None:
        raise ConfigError(f"the releases of {package} are not known: pip index versions printed no list of them")
    return [*dict.fromkeys(_release(version.strip()) for version in reversed(found[1].split(",")))]


def between(known: Sequence[str], good: str, bad: str, package: str) -> list[str]:
    """Returns the releases from one to the other, both of them among these, in the order of their numbers.

    Raises:
        ConfigError: one of the two is no release on the index, or they are the same.
    """
    good, bad = _release(good), _release(bad)
    for release in (good, bad):
        if release not in known:
            near = [one for one in known if one.split(".")[:2] == release.split(".")[:2]] or known[-3:]
            raise ConfigError(f"{package} has no release {release} here: there are, among others, {', '.join(near)}")
    if good == bad:
        raise ConfigError(f"--good and --bad must be two releases, got {good} for both")
    first, last = sorted((known.index(good), known.index(bad)))
    return [*known[first : last + 1]]


def _release(version: str) -> str:
    """Returns a version without the label of a build, such as `+cpu`."""
    return version.partition("+")[0]
