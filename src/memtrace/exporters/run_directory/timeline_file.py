"""The timeline of the step with the highest peak so far, as one JSON file beside the step log.

Where the settings want them, those of all traced steps are in a second file, one a line.

`{"schema": "memtrace.timeline/1", "step": 12, "rank": 0, "seconds": [0.0, ...], "moments": {"peak": 0.31, ...},
"categories": {"weights": [N, ...], ...}}`, with one size for each of the seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memtrace.errors import LogFormatError, OutputError
from memtrace.exporters.run_directory.json_lines import json_lines, rotated_path
from memtrace.record.breakdown import StepCurve, StepRecord
from memtrace.record.categories import Category, Moment
from memtrace.record.strict_json import Fields, read_document
from memtrace.record.whole_file import write_whole

TIMELINE_SCHEMA = "memtrace.timeline/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeline:
    """What a timeline file holds."""

    step: int
    curve: StepCurve


def timeline_path(directory: str | os.PathLike[str], rank: int) -> Path:
    """Returns where a rank's timeline is in the log directory of a run."""
    return Path(directory) / f"timeline-rank{rank}.json"


def timelines_path(directory: str | os.PathLike[str], rank: int) -> Path:
    """Returns where a rank's timelines are, where every traced step leaves one."""
    return Path(directory) / f"timelines-rank{rank}.jsonl"


def timeline_text(record: StepRecord, curve: StepCurve) -> str:
    """Returns a curve as JSON, in one line without the line feed."""
    document = {
        "schema": TIMELINE_SCHEMA,
        "step": record.step,
        "rank": record.rank,
        "seconds": [round(second, 7) for second in curve.seconds],
        "moments": {moment.value: round(second, 7) for moment, second in curve.moments.items()},
        "categories": {category.value: list(sizes) for category, sizes in curve.by_category.items()},
    }
    return json.dumps(document, separators=(",", ":"))


def write_timeline(directory: str | os.PathLike[str], record: StepRecord) -> None:
    """Writes the curve of a record in place of the one before, whole or not at all; nothing where it has none.

    Raises:
        OutputError: the file cannot be written.
    """
    if record.curve is None:
        return
    path = timeline_path(directory, record.rank)
    try:
        write_whole(path, timeline_text(record, record.curve) + "\n")
    except OSError as error:
        raise OutputError(f"the timeline {path} cannot be written: {error.strerror or error}") from error


def read_timeline(path: str | os.PathLike[str]) -> StepTimeline | None:
    """Returns what a timeline file holds; None where there is no such file.

    Raises:
        LogFormatError: the file cannot be read, or is no timeline.
    """
    found = read_document(path, "timeline", TIMELINE_SCHEMA)
    return None if found is None else _parse(found)


def read_timelines(directory: str | os.PathLike[str], rank: int) -> Iterator[StepTimeline]:
    """Yields the timelines that a rank has left, of earlier launches too: that of the highest peak, then all others.

    A line that was not finished is left out.

    Raises:
        LogFormatError: a file cannot be read, or holds what is no timeline.
    """
    highest = read_timeline(timeline_path(directory, rank))
    if highest is not None:
        yield highest
    path = timelines_path(directory, rank)
    if path.is_file() or rotated_path(path).is_file():
        for document, place in json_lines(path, "log of timelines"):
            found = Fields.of(document, place)
            found.schema(TIMELINE_SCHEMA)
            yield _parse(found)


def _parse(found: Fields) -> StepTimeline:
    seconds = _ascending(found)
    sizes = found.object("categories")
    by_category = {category: sizes.integers(category) for category in sizes.words(Category)}
    if any(len(row) != len(seconds) for row in by_category.values()):
        raise LogFormatError(
            f"{found.source}: each of categories must have one size for each of the {len(seconds)} seconds"
        )
    times = found.object("moments")
    return StepTimeline(
        step=found.integer("step"),
        curve=StepCurve(
            seconds=seconds,
            by_category={category: by_category[category] for category in Category if category in by_category},
            moments={moment: times.number(moment) for moment in times.words(Moment)},
        ),
    )


def _ascending(found: Fields) -> Sequence[float]:
    seconds = found.numbers("seconds")
    if list(seconds) != sorted(seconds):
        raise LogFormatError(f"{found.source}: seconds must ascend")
    return seconds
