"""What each block of a device was for, from all sources: the most trusted one that knows a block counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memtrace.forensics.attribution.by_note import labels_by_note
from memtrace.forensics.attribution.by_size import labels_by_size
from memtrace.forensics.attribution.by_stack import labels_by_stack
from memtrace.forensics.attribution.expected import ExpectedModel
from memtrace.forensics.attribution.labels import NOTHING, Label
from memtrace.forensics.attribution.lives import Lives, labels_by_life, read_lives
from memtrace.forensics.history import History
from memtrace.forensics.trace import Stacks


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributed:
    """A history whose blocks have labels."""

    history: History
    lives: Lives
    labels: Mapping[int, Label]
    """By the index of the lifetime, of those that somebody can tell anything about."""

    def label(self, index: int) -> Label:
        """Returns what a block was for."""
        return self.labels.get(index, NOTHING)


def attribute(history: History, stacks: Stacks, model: ExpectedModel | None) -> Attributed:
    """Returns the blocks of a device with what they were for.

    Args:
        history: of the device.
        stacks: of the snapshot.
        model: whose sizes blocks are matched with, where one was given.
    """
    lives = read_lives(history)
    by_size = {} if model is None else labels_by_size(history, lives, model)
    better = {**labels_by_stack(history, lives, stacks), **by_size, **labels_by_note(history)}
    return Attributed(history=history, lives=lives, labels={**labels_by_life(history, lives, better), **better})
