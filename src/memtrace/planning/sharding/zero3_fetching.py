"""When ZeRO-3 gathers and releases weights, and in which tensors.

Modelled after DeepSpeed 0.19, runtime/zero/partitioned_param_coordinator.py and partition_parameters.py: the order of
modules is recorded in one forward and backward pass; from the next one on weights are gathered ahead of their use.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch import nn

from memtrace.errors import PlanError
from memtrace.planning.sharding.shares import Zero3Settings
from memtrace.simulation.tensor import DEVICE


@dataclass(slots=True, eq=False)
class ShardedParameter:
    """A parameter of which this rank holds a share."""

    parameter: nn.Parameter
    number: int
    """Position in the model; gathers go by it."""
    shape: torch.Size
    share: int
    """Elements of one rank's share, padded."""
    persists: bool
    """Whether it stays gathered from step to step."""
    shard: torch.Tensor | None = None
    """This rank's share."""
    gathered: bool = False
    users: set[nn.Module] = field(default_factory=set)
    """Modules that need it now."""

    @property
    def elements(self) -> int:
        """Elements without padding."""
        return self.shape.numel()


class _Trace(Enum):
    NONE = auto()
    RECORDED = auto()
    """The order of modules is being recorded."""
    COMPLETE = auto()


@dataclass(slots=True, eq=False)
class _Flight:
    """One gather that was begun."""

    parameters: Sequence[ShardedParameter]
    flat: torch.Tensor
    """The shares of all ranks, side by side; kept until the last parameter was asked for."""
    landed: bool = False
    """Whether the parameters were copied out of it: all of them, when the first one was asked for."""


class Fetching:
    """Gathers and releases, notified of each module's beginning and end.

    Args:
        held: the parameters of each module, without those of its children; what modules take of others is added.
        settings: thresholds.
        world_size: ranks.
        on_gloo: whether gathers go through a copy, as gloo's do.
        from_host: whether the shares are offloaded: a copy on the device is gathered from.
        note: is notified of each flat tensor of a gather, with None, and of gathered weights, with their parameter.
    """

    def __init__(
        self,
        held: Mapping[nn.Module, list[ShardedParameter]],
        settings: Zero3Settings,
        world_size: int,
        *,
        on_gloo: bool,
        from_host: bool,
        note: Callable[[torch.Tensor, ShardedParameter | None], None],
    ) -> None:
        self._held, self._settings, self._world_size = held, settings, world_size
        self._on_gloo, self._from_host, self._note = on_gloo, from_host, note
        self._trace = _Trace.NONE
        self._modules: list[nn.Module] = []
        self._queue: deque[tuple[ShardedParameter, int]] = deque()
        self._order: list[tuple[ShardedParameter, int]] = []
        self._uses: dict[ShardedParameter, list[int]] = {}
        self._before: list[int] = []
        """Elements of all modules before each one of the trace."""
        self._fetched_for: dict[ShardedParameter, int] = {}
        """The last use for which a parameter was fetched, or found to be there."""
        self._flights: dict[ShardedParameter, _Flight] = {}
        self._released: dict[tuple[nn.Module, int], list[ShardedParameter]] = {}
        self._step = 0
        self._live = 0
        self._in_backward: dict[nn.Module, None] = {}
        self._in_forward: list[nn.Module] = []
        self._by_parameter = {known.parameter: known for every in held.values() for known in every}

    def pass_begins(self) -> None:
        """A forward pass of the model begins."""
        self._in_forward.clear()
        self._land_all()
        if self._trace is _Trace.RECORDED:
            self._complete_trace()
        elif self._trace is _Trace.NONE:
            self._trace = _Trace.RECORDED
        self._queue = deque(self._order)
        self._fetched_for = {}
        self._step = self._live = 0

    def begins(self, module: nn.Module, *, forward: bool) -> None:
        """Gathers what a module needs, and what the next ones need."""
        if self._trace is _Trace.COMPLETE and self._modules[self._step : self._step + 1] != [module]:
            self._trace, self._modules, self._order = _Trace.NONE, [], []
            self._queue.clear()
            self._released.clear()
            self._land_all()
        if self._trace is _Trace.RECORDED:
            self._modules.append(module)
        if forward:
            self._in_forward.append(module)
        else:
            self._in_backward[module] = None
        needed = self._held[module]
        self._gather([known for known in needed if not known.gathered and known not in self._flights])
        for known in needed:
            known.users.add(module)
            if known in self._flights:
                self._land(self._flights.pop(known))
        if self._trace is _Trace.COMPLETE:
            self._look_ahead(needed)
        self._step += 1

    def ends(self, module: nn.Module, *, forward: bool) -> None:
        """Releases what a module needed, unless it is needed again soon."""
        candidates = self._to_release(module)
        if forward:
            while self._in_forward and self._in_forward.pop() is not module:
                pass  # a recomputation that was stopped has left its modules without an end
        else:
            self._in_backward.pop(module, None)
        for known in self._held[module]:
            known.users.discard(module)
            if known in candidates:
                self._release(known)

    def reaches_for(self, parameter: torch.Tensor) -> None:
        """Gathers a parameter that the running module takes of another one, and counts it to the module from now on."""
        known = self._by_parameter.get(parameter) if self._in_forward else None  # type: ignore[call-overload]
        if known is None or known.gathered:
            return
        held = self._held[self._in_forward[-1]]
        if known not in held:
            held.append(known)
        if known in self._flights:
            self._land(self._flights.pop(known))
        else:
            self.gather_whole([known])

    def pass_ends(self) -> None:
        """Releases what modules hold whose backward pass had no end, such as embeddings."""
        for module in list(self._in_backward):
            for known in self._held[module]:
                known.users.discard(module)
                if not known.persists:
                    self._release(known)
        self._in_backward.clear()

    def release_all(self, everything: Iterable[ShardedParameter]) -> None:
        """Releases all weights, for the step of the optimizer."""
        self._land_all()
        for known in everything:
            known.users.clear()
            self._release(known)

    def gather_whole(self, parameters: Iterable[ShardedParameter]) -> None:
        """Gathers parameters, each in a tensor of its own with the padding; one rank alone has them already."""
        for known in parameters:
            self._fill(known, self._buffer([known]) if self._world_size > 1 or self._from_host else known.shard)

    def _gather(self, parameters: Iterable[ShardedParameter]) -> None:
        """Begins a gather. A single parameter becomes a view of what was gathered."""
        found = sorted(parameters, key=lambda known: known.number)
        self._live += sum(known.elements for known in found)
        if self._world_size == 1 or len(found) == 1:
            self.gather_whole(found)
        elif found:
            flat = self._buffer(found)
            self._note(flat, None)
            flight = _Flight(found, flat)
            self._flights |= dict.fromkeys(found, flight)

    def _land(self, flight: _Flight) -> None:
        """Copies all parameters out of the flat tensor, once."""
        if flight.landed:
            return
        flight.landed = True
        for known in flight.parameters:
            self._fill(known, torch.empty(known.elements, dtype=flight.flat.dtype, device=DEVICE))

    def _land_all(self) -> None:
        """Ends all gathers that nobody waits for."""
        while self._flights:
            known = next(iter(self._flights))
            self._land(self._flights.pop(known))
            self._release(known)

    def _buffer(self, parameters: Sequence[ShardedParameter]) -> torch.Tensor:
        share, dtype = sum(known.share for known in parameters), parameters[0].parameter.dtype
        own = torch.empty(share, dtype=dtype, device=DEVICE) if self._from_host else None
        gathered = torch.empty(share * self._world_size, dtype=dtype, device=DEVICE)
        del own
        if self._on_gloo:
            torch.empty_like(gathered)
        return gathered

    def _fill(self, known: ShardedParameter, tensor: torch.Tensor | None) -> None:
        assert tensor is not None
        known.parameter.data = tensor[: known.elements].view(known.shape)
        known.gathered = True
        self._note(known.parameter, known)

    def _release(self, known: ShardedParameter) -> None:
        if known.gathered and not known.users:
            known.parameter.data = torch.empty(0, dtype=known.parameter.dtype, device=DEVICE)
            known.gathered = False
            self._live -= known.elements

    def _look_ahead(self, needed: Sequence[ShardedParameter]) -> None:
        """Takes the parameters of now out of the queue, and gathers those that follow."""
        missing = {known for known in needed if self._fetched_for.get(known, -1) < self._step}
        popped: set[ShardedParameter] = set()
        while self._queue and len(popped) < len(missing):
            known, use = self._queue.popleft()
            self._fetched_for[known] = use
            popped.add(known)
        if popped != missing:
            raise PlanError("ZeRO 3 needs a model that runs its modules in the same order each time")
        limit = min(self._settings.max_live - self._live, self._settings.prefetch_bucket)
        ahead: list[ShardedParameter] = []
        elements = 0
        while self._queue and elements < limit:
            known, use = self._queue.popleft()
            self._fetched_for[known] = max(self._fetched_for.get(known, -1), use)
            if not known.gathered and known not in self._flights and known not in ahead:
                ahead.append(known)
                elements += known.elements
        self._gather(ahead)

    def _complete_trace(self) -> None:
        self._trace = _Trace.COMPLETE
        self._uses, self._before, self._order = {}, [], []
        elements = 0
        for position, module in enumerate(self._modules):
            self._before.append(elements)
            for known in sorted(self._held[module], key=lambda known: known.number):
                self._order.append((known, position))
                self._uses.setdefault(known, []).append(position)
                elements += known.elements

    def _to_release(self, module: nn.Module) -> list[ShardedParameter]:
        """Returns what may go: not persistent, not fetched for a later use, not used again within the distance."""
        if self._trace is not _Trace.COMPLETE:
            return list(self._held[module])
        key = module, self._step
        if key not in self._released:
            self._released[key] = [
                known
                for known in self._held[module]
                if not known.persists and self._fetched_for.get(known, -1) <= self._step and not self._soon(known)
            ]
        return self._released[key]

    def _soon(self, known: ShardedParameter) -> bool:
        uses = self._uses.get(known, [])
        following = bisect_left(uses, self._step)
        if following == len(uses) or self._step >= len(self._before):
            return False
        return self._before[uses[following]] - self._before[self._step] < self._settings.max_reuse
