"""Allocator events of a step that is run on tensors without memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from memtrace.record.breakdown import AllocatorReading
from memtrace.sources.autograd_torch_private import running_node
from memtrace.sources.events import Block, Coordinates, Event, Events, Window


class SimulatedEvents:
    """The allocator of a simulation: every block has an address of its own, and a clock counts what happens."""

    def __init__(self, address_of: Callable[[torch.UntypedStorage], int]) -> None:
        self.nodes: list[tuple[int, int | None]] = []
        """Which node of autograd allocates in its backward pass, from when on: time and number, None outside of all."""
        self._ticks = itertools.count(1)
        self._addresses = itertools.count(1)
        self._live: dict[int, int] = {}
        self._events: list[Event] = []
        self._begin_ns: int | None = None
        self._live_at_begin: Sequence[Block] = ()
        self.coordinates = Coordinates(now_ns=self._ticks.__next__, address_of=address_of)

    def allocate(self, nbytes: int) -> int:
        """Returns the address of a new block."""
        address = next(self._addresses)
        node = running_node()
        if node != (self.nodes[-1][1] if self.nodes else None):
            self.nodes.append((self.coordinates.now_ns(), node))
        self._live[address] = nbytes
        self._note(address, nbytes)
        return address

    def free(self, address: int) -> None:
        """Frees the block at an address."""
        self._note(address, -self._live.pop(address))

    @property
    def is_open(self) -> bool:
        """Whether a window is open."""
        return self._begin_ns is not None

    def open(self, expected_allocations: int | None = None) -> bool:
        """Begins a window; False where one is open."""
        if self.is_open:
            return False
        self._events = []
        self._live_at_begin = [Block(address, nbytes) for address, nbytes in self._live.items()]
        self._begin_ns = self.coordinates.now_ns()
        return True

    def fits(self, allocations: int) -> bool:
        """Returns True: all events are kept."""
        return True

    def interrupted(self) -> bool:
        """Returns False: nobody else records a simulation."""
        return False

    def hears_this_thread(self) -> bool:
        """Returns True: a simulation has one thread."""
        return True

    def close(self) -> Window:
        """Ends the window and returns what happened in it."""
        assert self._begin_ns is not None, "close() without open()"
        begin_ns, self._begin_ns = self._begin_ns, None
        return Window(
            begin_ns=begin_ns,
            end_ns=self.coordinates.now_ns(),
            events=Events.of(self._events),
            live_at_begin=self._live_at_begin,
        )

    def abandon(self) -> None:
        """Ends the window, if one is open, and forgets it."""
        self._begin_ns = None

    def reading(self) -> AllocatorReading | None:
        """Returns None: the window has all there is to know."""
        return None

    def _note(self, address: int, delta: int) -> None:
        if self._begin_ns is not None:
            self._events.append(Event(self.coordinates.now_ns(), address, delta))
