"""The history of a device as columns, and the stacks that its entries refer to."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

UNKNOWN: Final = -1
"""In a column: the entry does not say."""


class Frame(NamedTuple):
    """A line of code on a stack."""

    filename: str
    line: int
    name: str


class Entry(NamedTuple):
    """One entry of a history. A field that the entry has not is -1, or empty."""

    action: str
    address: int
    size: int
    """Bytes as requested; for a failed request those that were wanted."""
    stream: int
    time_us: int
    stack: int
    """Index into `Stacks`."""
    note: str
    """The metadata that somebody has put on it."""
    category: str
    pool: str
    """The private pool, as text; empty for the allocator's own."""
    device_free: int
    """Bytes that the device had free; only of a failed request."""


@dataclass(slots=True)
class Trace:
    """The history of one device, oldest entry first, a column a field."""

    actions: array[int] = field(default_factory=lambda: array("i"))
    addresses: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("q"))
    streams: array[int] = field(default_factory=lambda: array("q"))
    times_us: array[int] = field(default_factory=lambda: array("q"))
    stacks: array[int] = field(default_factory=lambda: array("i"))
    words: dict[str, int] = field(default_factory=lambda: {"": 0})
    """Numbers of the texts in `actions`, `notes`, `categories` and `pools`."""
    notes: dict[int, int] = field(default_factory=dict)
    """By row, where there is one; so are the next three."""
    categories: dict[int, int] = field(default_factory=dict)
    pools: dict[int, int] = field(default_factory=dict)
    device_free: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.actions)

    def __iter__(self) -> Iterator[Entry]:
        return self.entries(0)

    def entries(self, first: int) -> Iterator[Entry]:
        """Yields the entries from this row on."""
        words = [*self.words]
        columns = (self.actions, self.addresses, self.sizes, self.streams, self.times_us, self.stacks)
        wanted = (memoryview(column)[first:] for column in columns)
        for row, (action, *numbers) in enumerate(zip(*wanted, strict=True), first):
            texts = (words[column.get(row, 0)] for column in (self.notes, self.categories, self.pools))
            yield Entry._make((words[action], *numbers, *texts, self.device_free.get(row, UNKNOWN)))


class Stacks(Sequence[tuple[Frame, ...]]):
    """Every stack of a snapshot once, the innermost frame first."""

    def __init__(self) -> None:
        self._frames: dict[Frame, int] = {}
        self._listed: list[Frame] = []
        self._stacks: dict[tuple[int, ...], int] = {}
        self._contents: list[tuple[int, ...]] = []

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, index: Any) -> Any:
        """Returns the frames of a stack."""
        return tuple(self._listed[number] for number in self._contents[index])

    def frame(self, frame: Frame) -> int:
        """Returns the number of a frame."""
        number = self._frames.setdefault(frame, len(self._listed))
        if number == len(self._listed):
            self._listed.append(frame)
        return number

    def numbers(self, index: int) -> tuple[int, ...]:
        """Returns the numbers of the frames of a stack."""
        return self._contents[index]

    def stack(self, frames: tuple[int, ...]) -> int:
        """Returns the number of a stack of these frames."""
        number = self._stacks.setdefault(frames, len(self._contents))
        if number == len(self._contents):
            self._contents.append(frames)
        return number
