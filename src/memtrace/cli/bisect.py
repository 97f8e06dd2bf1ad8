"""`memtrace bisect`: which release of a package, or which commit, changed the peak of a case."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from memtrace.cli.case_options import ChosenCase, add_case_arguments, case_of
from memtrace.cli.show import console
from memtrace.errors import ConfigError
from memtrace.gate.findings import Change, peak_changes
from memtrace.gate.processes import Outcome, Unplanned
from memtrace.gate.result import OUTSIDE
from memtrace.gate.versions.bisection import Jump, Stretch, most_trials
from memtrace.gate.versions.commits import commits, described, root_of
from memtrace.gate.versions.environments import Environments, cache_directory
from memtrace.gate.versions.kept import KeptOutcomes
from memtrace.gate.versions.releases import Index, between, releases
from memtrace.gate.versions.search import Commits, Found, Releases, Search, Versions
from memtrace.record.units import format_bytes

_CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
"""Where torch's builds without CUDA are."""

_ROWS = 12
"""Changes that a table has at most, the largest ones."""

SAME = 1
"""Exit status where the peak is the same at both ends."""


class Bisect:
    """Finds the version that changed a peak."""

    name = "bisect"
    summary = "Find the release of a package, or the commit, that changed the peak of a case."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the two ends, the case, and where packages come from."""
        parser.add_argument("--good", required=True, metavar="VERSION", help="a release, or without --package a commit")
        parser.add_argument("--bad", required=True, metavar="VERSION", help="another one, with another peak")
        parser.add_argument(
            "--package",
            metavar="NAME",
            help="such as transformers, torch, peft; without it commits of the repository here",
        )
        add_case_arguments(parser)
        group = parser.add_argument_group("packages")
        group.add_argument(
            "--with",
            dest="beside",
            action="append",
            default=[],
            metavar="REQUIREMENT",
            help="install this with each release, such as peft==0.15.2; again for each",
        )
        group.add_argument("--index-url", metavar="URL", help="index of packages; default: as pip is set up")
        group.add_argument("--extra-index-url", action="append", default=[], metavar="URL", help="a further index")
        group.add_argument("--find-links", action="append", default=[], metavar="PLACE", help="a directory of packages")
        group.add_argument("--no-index", action="store_true", help="packages come from --find-links alone")
        group.add_argument(
            "--cache", type=Path, metavar="DIR", help="where releases and outcomes are kept; default ~/.cache/memtrace"
        )
        group = parser.add_argument_group("output")
        group.add_argument("--json", action="store_true", help="print JSON")

    def run(self, arguments: argparse.Namespace) -> int:
        """Prints the version and what it changed; returns 0, or 1 where the peak is the same at both ends.

        Raises:
            ConfigError: the case, an end or the package cannot be used.
            OutputError: nothing can be kept in the cache directory.
            PlanError: the case cannot be planned at one of the ends.
        """
        chosen = case_of(arguments)
        cache = (arguments.cache or cache_directory()).absolute()
        versions, ordered = _versions(arguments, chosen, cache)
        search = Search(case=chosen.case, versions=versions, kept=KeptOutcomes(cache / "outcomes"), say=_say)
        _tell(f"{len(ordered)} {_kind(arguments)}, from {ordered[0]:.12} to {ordered[-1]:.12}")
        if arguments.package == "torch" and sys.platform == "linux":
            _tell(_of_builds(cache, most_trials(len(ordered))))
        found = search.run(ordered)
        name = arguments.package
        if arguments.json:
            print(json.dumps(_document(name, chosen.case.name, found), indent=2, allow_nan=False))
        elif found.jump is None:
            peak = format_bytes(found.result(ordered[0]).peak_bytes)
            print(f"The peak of {chosen.case.name} is {peak} at both ends: there is no change to look for.")
        else:
            label = f"{name} {found.jump.after}" if name else described(_repository(versions), found.jump.after)
            console().print(_answer(label, chosen.case.name, found, found.jump))
        return SAME if found.jump is None else 0


def _versions(arguments: argparse.Namespace, chosen: ChosenCase, cache: Path) -> tuple[Versions, list[str]]:
    """Returns what plans the case with a version, and the versions from one end to the other."""
    if arguments.package is None:
        if arguments.beside:
            raise ConfigError("--with is for releases of a package: leave it out, or give --package")
        repository = root_of(chosen.root)
        root, *python_path = (_inside(path, repository) for path in (chosen.root, *chosen.python_path))
        found = Commits(repository=repository, inside=root, python_path=tuple(python_path))
        return found, commits(repository, arguments.good, arguments.bad)
    index = Index(
        url=arguments.index_url,
        extra_urls=tuple(arguments.extra_index_url),
        find_links=tuple(_place(place) for place in arguments.find_links),
        none=arguments.no_index,
    )
    made = Environments(directory=cache / "environments", index=index, beside=tuple(arguments.beside), say=_tell)
    known = releases(arguments.package, index)
    ordered = between(known, arguments.good, arguments.bad, arguments.package)
    package = arguments.package
    return Releases(package=package, environments=made, root=chosen.root, python_path=chosen.python_path), ordered


def _inside(path: Path, repository: Path) -> Path:
    try:
        return path.resolve().relative_to(repository.resolve())
    except ValueError as error:
        raise ConfigError(f"{path} is not in the repository {repository}, whose commits are compared") from error


def _place(place: str) -> str:
    """Returns a directory as an absolute path, and an address as it is."""
    return str(Path(place).absolute()) if Path(place).exists() else place


def _repository(versions: Versions) -> Path:
    assert isinstance(versions, Commits)
    return versions.repository


def _kind(arguments: argparse.Namespace) -> str:
    return "commits" if arguments.package is None else f"releases of {arguments.package}"


def _say(version: str, outcome: Outcome, was_kept: bool) -> None:
    said = f"skipped: {outcome.reason}" if isinstance(outcome, Unplanned) else format_bytes(outcome.peak_bytes)
    _tell(f"{version:<12.12}  {said}{' (kept from before)' if was_kept else ''}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _of_builds(cache: Path, trials: int) -> str:
    """Returns what releases of torch take, said before the first one is downloaded."""
    there = next(path for path in (cache, *cache.parents) if os.access(path, os.F_OK))
    return (
        f"Up to {trials} of them are installed in {cache}, where {format_bytes(shutil.disk_usage(there).free)} are "
        f"free. A release with its CUDA packages takes 5 to 8 GB. No plan needs CUDA: --extra-index-url {_CPU_BUILDS} "
        "has builds of 1 GB."
    )


def _answer(label: str, case: str, found: Found, jump: Jump) -> Group:
    before, after = found.result(jump.before), found.result(jump.after)
    sizes = f"{format_bytes(before.peak_bytes)} before, {format_bytes(after.peak_bytes)} after"
    title = Text(f"{label} changed the peak of {case} by {_signed(jump.nbytes)}: {sizes}", "bold")
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("at the peak", ratio=1)
    table.add_column("module", ratio=1)
    for head in ("before", "after", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    changes = peak_changes(before, after)
    for change in changes[:_ROWS]:
        sizes_of = (format_bytes(change.before), format_bytes(change.now), _signed(change.growth))
        table.add_row(change.entry, change.module or OUTSIDE, *sizes_of)
    lines = list(_remarks(found, jump, changes))
    return Group(title, table, *(Text(line) for line in lines))


def _remarks(found: Found, jump: Jump, changes: Sequence[Change]) -> Iterator[str]:
    if len(changes) > _ROWS:
        rest = sum(change.growth for change in changes[_ROWS:])
        yield f"{len(changes) - _ROWS} smaller changes add up to {_signed(rest)}; --json lists all."
    if jump.skipped:
        yield f"Or one of {', '.join(jump.skipped)}, which cannot be planned: the last that can is {jump.before}."
    if jump.elsewhere:
        yield "There are several jumps, of which this is one. The peak changes, too:"
        yield from (f"  by {_signed(one.nbytes)} between {one.first} and {one.last}" for one in jump.elsewhere)


def _signed(nbytes: int) -> str:
    return f"+{format_bytes(nbytes)}" if nbytes > 0 else format_bytes(nbytes)


def _document(package: str | None, case: str, found: Found) -> dict[str, Any]:
    jump = found.jump
    document: dict[str, Any] = {"schema": "memtrace.bisect/1", "package": package, "case": case, "jump": None}
    if jump is not None:
        changes = peak_changes(found.result(jump.before), found.result(jump.after))
        document["jump"] = {
            "before": jump.before,
            "after": jump.after,
            "bytes": jump.nbytes,
            "skipped": list(jump.skipped),
            "elsewhere": [_stretch_document(one) for one in jump.elsewhere],
            "changes": [
                {
                    "entry": change.entry,
                    "module": change.module or OUTSIDE,
                    "before_bytes": change.before,
                    "after_bytes": change.now,
                }
                for change in changes
            ],
        }
    document["tried"] = {
        version: {"reason": outcome.reason} if isinstance(outcome, Unplanned) else {"peak_bytes": outcome.peak_bytes}
        for version, outcome in found.tried.items()
    }
    return document


def _stretch_document(stretch: Stretch) -> dict[str, str | int]:
    return {"first": stretch.first, "last": stretch.last, "bytes": stretch.nbytes}
