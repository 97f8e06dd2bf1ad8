"""What `memtrace compare` says of two runs: steps of equal shape, what grew and by how much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from memtrace.cli.run_logs import rank_logs
from memtrace.errors import ConfigError
from memtrace.exporters.table import category_name
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.record.step_comparison import ByShape, Growth, StepPair, by_shape, pairs, shapes
from memtrace.record.units import format_bytes, parse_bytes

_NAMED = 4
"""Categories that the first line names."""


@dataclass(frozen=True, slots=True)
class Threshold:
    """How much a peak may grow."""

    nbytes: int | None
    ratio: float | None
    """As a share of the first; None where the threshold is a size."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Returns the threshold that a size such as 512MiB or a percentage such as 5% stands for.

        Raises:
            ConfigError: the text is neither.
        """
        if not text.strip().endswith("%"):
            return cls(parse_bytes(text), None)
        try:
            ratio = float(text.strip()[:-1]) / 100
        except ValueError as error:
            raise ConfigError(f"--fail-above must be a size or a percentage, got {text!r}") from error
        if not ratio >= 0:
            raise ConfigError(f"--fail-above must be 0% or more, got {text!r}")
        return cls(None, ratio)

    def is_passed(self, first: int, second: int) -> bool:
        """Returns whether the second size is above the first by more."""
        allowed = self.nbytes if self.nbytes is not None else (self.ratio or 0.0) * first
        return second - first > allowed


def equal_steps(first: Path, second: Path, rank: int | None, step: int | None) -> list[StepPair]:
    """Returns the steps of two runs that can be compared, the one whose peak grew most first; at least one.

    Args:
        first: the run before.
        second: the run after.
        rank: the only one that is wanted; None wants all that both have.
        step: the step of both, whatever its shape; None takes the newest of each shape that both have.

    Raises:
        ConfigError: they have no such step in common.
        LogFormatError: a log cannot be read, or none has a record.
    """
    runs = [{log.rank: _records(log.records(), step) for log in rank_logs(path, rank)} for path in (first, second)]
    found = pairs(*runs)
    if found:
        return found
    if step is not None:
        raise ConfigError(f"{first} and {second} have no rank in common that knows the peak of step {step}")
    known = [", ".join(shapes(run)) or "none with a known peak" for run in runs]
    raise ConfigError(
        f"no step of one run has the batch of one of the other on the same rank: {first} has {known[0]}, "
        f"{second} has {known[1]}; --step N compares step N of both, whatever its batch"
    )


def _records(records: Sequence[StepRecord], step: int | None) -> ByShape:
    """Returns the records to compare, by shape; the step that was named as if it had no shape."""
    if step is None:
        return by_shape(records)
    wanted = [record for record in records if record.step == step and Moment.PEAK in record.moments]
    return {None: wanted[-1]} if wanted else {}


def comparison_table(names: tuple[str, str], found: Sequence[StepPair]) -> Group:
    """Returns what grew: the step whose peak grew most in full, the peaks of the others below."""
    pair = found[0]
    parts: list[Text | Table] = [
        Text(f"A {names[0]}, step {pair.first.step} · B {names[1]}, step {pair.second.step}", "bold"),
        Text(" · ".join(_headline(pair))),
    ]
    for moment, rows in pair.moments().items():
        table = _table(moment.value.replace("_", " "))
        for row in rows:
            if row.category is None:
                table.add_section()
            name = category_name(row.category) if row.category is not None else Text("total", "bold")
            table.add_row(name, *_cells(row))
        parts.append(table)
    if len(found) > 1:
        table = _table("peak of the other steps")
        for other in found[1:]:
            table.add_row(f"rank {other.first.rank}, {_batch(other.first)}", *_cells(other.peak))
        parts.append(table)
    return Group(*parts)


def comparison_document(names: tuple[str, str], found: Sequence[StepPair]) -> dict[str, Any]:
    """Returns the same for programs."""
    return {
        "schema": "memtrace.run_comparison/1",
        "first": names[0],
        "second": names[1],
        "steps": [
            {
                "rank": pair.first.rank,
                "batch": None if pair.first.batch is None else pair.first.batch.shape,
                "first_step": pair.first.step,
                "second_step": pair.second.step,
                "estimated": pair.estimated,
                "peak": _figures(pair.peak),
                "moments": {moment.value: [*map(_figures, rows)] for moment, rows in pair.moments().items()},
            }
            for pair in found
        ],
    }


def _headline(pair: StepPair) -> Iterator[str]:
    yield f"rank {pair.first.rank}"
    yield (
        _batch(pair.first) if pair.first.batch == pair.second.batch else f"{_batch(pair.first)}, {_batch(pair.second)}"
    )
    grown = sorted((row for row in pair.moments()[Moment.PEAK][:-1] if row.nbytes), key=lambda row: -abs(row.nbytes))
    words = ", ".join(f"{row.category} {_signed(row.nbytes)}" for row in grown[:_NAMED])
    change = _signed(pair.peak.nbytes) if pair.peak.nbytes else "unchanged"
    yield f"peak {change}" + (f": {words}" if words else "")
    if pair.estimated:
        yield "categories estimated: no traced step of this batch in both"


def _batch(record: StepRecord) -> str:
    return "batch not seen" if record.batch is None else f"batch {' x '.join(map(str, record.batch.shape))}"


def _table(title: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column(title, min_width=20, ratio=1)
    for head in ("A", "B", "difference", ""):
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _cells(row: Growth) -> tuple[str, str, str, str]:
    share = "" if row.ratio is None else f"{row.ratio:+.1%}"
    return format_bytes(row.first), format_bytes(row.second), _signed(row.nbytes), share


def _signed(nbytes: int) -> str:
    return f"+{format_bytes(nbytes)}" if nbytes > 0 else format_bytes(nbytes)


def _figures(row: Growth) -> dict[str, Any]:
    return {
        "category": "total" if row.category is None else row.category.value,
        "first_bytes": row.first,
        "second_bytes": row.second,
        "difference_bytes": row.nbytes,
    }
