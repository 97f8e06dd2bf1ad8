"""What each block of a device was for, from all sources: the most trusted one that knows a block counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from memtrace.errors import ConfigError
from memtrace.forensics.attribution.by_note import labels_by_note
from memtrace.forensics.attribution.by_run import labels_by_run
from memtrace.forensics.attribution.by_size import labels_by_size
from memtrace.forensics.attribution.by_stack import labels_by_stack
from memtrace.forensics.attribution.expected import ExpectedModel
from memtrace.forensics.attribution.labels import NOTHING, Label
from memtrace.forensics.attribution.lives import Lives, labels_by_life, read_lives
from memtrace.forensics.history import History, read_history
from memtrace.forensics.recorded_run import RunRecords, SeenRun, find_run
from memtrace.forensics.snapshot import AllocatorSnapshot
from memtrace.forensics.trace import Stacks


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributed:
    """A history whose blocks have labels."""

    history: History
    lives: Lives
    labels: Mapping[int, Label]
    """By the index of the lifetime, of those that somebody can tell anything about."""
    run: SeenRun | None = None
    """The memtrace run of the same process, where one was given."""

    def label(self, index: int) -> Label:
        """Returns what a block was for."""
        return self.labels.get(index, NOTHING)


def attribute_devices(
    snapshot: AllocatorSnapshot, model: ExpectedModel | None = None, runs: Sequence[RunRecords] = ()
) -> Iterator[Attributed]:
    """Yields each device with what its blocks were for, one at a time: each takes much memory.

    Args:
        snapshot: as it was loaded.
        model: whose sizes blocks are matched with, where one was given.
        runs: what the ranks of a run have recorded; each device is matched with the one of its process, if one is.

    Raises:
        ConfigError: runs were given, and none is of the process of any device; after the last device.
    """
    refused: ConfigError | None = None
    found = not runs
    for device in snapshot.devices:
        history, run = read_history(snapshot, device), None
        if runs:
            try:
                run, found = find_run(history, runs), True
            except ConfigError as error:
                refused = refused or error
        yield attribute(history, snapshot.stacks, model, run)
    if not found:
        raise refused or ConfigError("the snapshot has nothing that a run could be matched with")


def attribute(history: History, stacks: Stacks, model: ExpectedModel | None, run: SeenRun | None = None) -> Attributed:
    """Returns the blocks of a device with what they were for.

    Args:
        history: of the device.
        stacks: of the snapshot.
        model: whose sizes blocks are matched with, where one was given.
        run: the memtrace run of the same process, where one was given.
    """
    lives = read_lives(history, () if run is None else [step.end for step in run.steps])
    by_size = {} if model is None else labels_by_size(history, lives, model)
    by_run = {} if run is None else labels_by_run(history, lives, run, model)
    better = {**labels_by_stack(history, lives, stacks), **by_size, **by_run, **labels_by_note(history)}
    return Attributed(
        history=history, lives=lives, labels={**labels_by_life(history, lives, better), **better}, run=run
    )
