"""Directories that hold one release of a package, to stand first on Python's path; made by pip and kept.

A directory has the release and those of its requirements that this environment does not meet. What this environment
has is used from where it is: torch above all, unless torch is the package.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory

from memtrace.errors import OutputError
from memtrace.gate.versions.releases import Index, pip
from memtrace.record.units import format_bytes

OWN_NAME = "torch-memtrace"

LARGE = 100 * 10**6
"""Bytes of a download or of a release from which on they are told."""

_DRAFT = "draft-"
_DOWNLOAD = re.compile(r"Downloading (\S+) \((\d+(?:\.\d+)?) MB\)")
_BUILT_FOR = {"torch": ("torchvision",)}
"""By package, those that are built for one release of it, and that transformers imports where they are installed."""


def cache_directory() -> Path:
    """Returns where memtrace keeps what can be made again: `$XDG_CACHE_HOME/memtrace`, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memtrace"


def installed() -> list[str]:
    """Returns what is installed here, as `name==version` in the order of the names; memtrace itself is left out."""
    found = {(one.metadata["Name"] or "").lower(): one.version for one in distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name not in ("", OWN_NAME)]


def fingerprint(*parts: str) -> str:
    """Returns a name for what the parts say, of 16 characters."""
    return sha256("\n".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Environments:
    """Where releases are installed, and from where."""

    directory: Path
    index: Index
    beside: tuple[str, ...] = ()
    """Requirements that are installed with each release, such as `peft==0.15.2`."""
    say: Callable[[str], None] = lambda _: None
    """Told of each large download before it begins, and of what a large release takes once it is installed."""

    def path_of(self, package: str, version: str) -> Path:
        """Returns the directory of a release, which is made where it is not there.

        pip downloads and unpacks it, which takes seconds to minutes; code is compiled when it is first imported. One
        release is installed at a time, whoever else uses the directory. What was begun and interrupted is made anew.

        Raises:
            ConfigError: there is no pip.
            OutputError: nothing can be written there.
            PlanError: pip cannot install it.
        """
        here = {one.partition("==")[0] for one in installed()}
        built_for = here.intersection(_BUILT_FOR.get(package, ()))  # pip chooses those that go with it
        wanted = (f"{package}=={version}", *self.beside, *sorted(built_for))
        base = fingerprint(platform.python_version(), sys.prefix, *installed(), *self.index.options, *wanted)
        path = self.directory / f"{package}-{version}-{base}"
        with self._writable():
            self.directory.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            return path
        with self._alone(), TemporaryDirectory(dir=self.directory, prefix=_DRAFT) as draft:
            if not path.is_dir():
                made, scratch = Path(draft) / "packages", Path(draft) / "unpacked"
                made.mkdir()
                scratch.mkdir()
                missing = self._missing(wanted, Path(draft) / "report.json", scratch)
                if missing:
                    options = ("--no-compile", "--no-deps", "--target", str(made), *self.index.options)
                    pip("install", *options, *missing, heard=self._heard, scratch=scratch)
                made.rename(path)
                nbytes = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
                if nbytes >= LARGE:
                    count = len(missing) - 1
                    others = f" with {count} other package{'s' * (count != 1)}" if count > 0 else ""
                    self.say(f"{package} {version}{others} takes {format_bytes(nbytes)} in {path}")
        return path

    def _missing(self, wanted: tuple[str, ...], report: Path, scratch: Path) -> list[str]:
        """Returns what pip would install into this environment for some requirements, by exact versions."""
        options = ("--dry-run", "--report", str(report), *self.index.options)
        pip("install", *options, *wanted, heard=self._heard, scratch=scratch)
        chosen = [one["metadata"] for one in json.loads(report.read_text())["install"]]
        return [f"{one['name']}=={one['version']}" for one in chosen]

    def _heard(self, line: str) -> None:
        """Passes on what pip prints of a large download."""
        found = _DOWNLOAD.match(line)
        if found is not None and float(found[2]) * 10**6 >= LARGE:
            self.say(f"downloading {found[1].rpartition('/')[2]}, {found[2]} MB")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the directory's lock, and removes what others began and did not end."""
        with self._writable():
            lock = (self.directory / "lock").open("w")
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.directory.glob(f"{_DRAFT}*"):
                shutil.rmtree(left, ignore_errors=True)
            yield

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Says which directory it is that cannot be written."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"releases cannot be kept in {self.directory}: {error}; name another with --cache"
            ) from error
