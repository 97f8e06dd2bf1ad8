"""What blocks are for by what somebody has written on them: memtrace, torch's own categories, or the user."""

from __future__ import annotations

import re

from memtrace.forensics.attribution.labels import Label
from memtrace.forensics.history import History
from memtrace.record.categories import Category
from memtrace.record.readings.annotation import PREFIX, annotation
from memtrace.record.readings.snapshot_reading import Source

_ALIASES = {
    "parameter": Category.WEIGHTS,
    "parameters": Category.WEIGHTS,
    "weight": Category.WEIGHTS,
    "gradient": Category.GRADIENTS,
    "grad": Category.GRADIENTS,
    "grads": Category.GRADIENTS,
    "activation": Category.ACTIVATIONS,
    "input": Category.INPUTS,
    "temporary": Category.TEMPORARIES,
    "buffer": Category.BUFFERS,
    "workspace": Category.WORKSPACES,
}
"""Other words for categories: those of torch's memory profile, and singular forms."""
_DTYPE = re.compile(r"(b?float\d+\w*|u?int\d+|\d+-bit)\Z")


def note_of(label: Label) -> str:
    """Returns what is written on a block, for `labels_by_note` to read."""
    return annotation(label.category, label.component, label.dtype)


def labels_by_note(history: History) -> dict[int, Label]:
    """Returns what the notes of a history tell, by the index of the lifetime; the last one of a block counts."""
    open_at: dict[int, list[tuple[int, int]]] = {}
    for index, life in enumerate(history.timeline.lifetimes):
        open_at.setdefault(life.address, []).append((life.begin, index))
    found = {}
    for note in history.notes:
        label = parse_note(note.text)
        if label is None:
            continue
        blocks = open_at.get(note.address, [])
        meant = next((index for begin, index in reversed(blocks) if begin < note.position), None)
        if meant is not None:
            found[meant] = label
    return found


def parse_note(text: str) -> Label | None:
    """Returns what a note says; None where it names no category."""
    words = text.removeprefix(PREFIX).strip().lower().split()
    if not words or (len(words) > 1 and not text.startswith(PREFIX)):
        return None
    name = words[0]
    category = _ALIASES.get(name) or next((known for known in Category if known.value == name), None)
    if category is None or category is Category.UNATTRIBUTED:
        return None
    rest = words[1:]
    dtype = rest.pop() if rest and _DTYPE.match(rest[-1]) else ""
    return Label(category, " ".join(rest), dtype, Source.ANNOTATION)
