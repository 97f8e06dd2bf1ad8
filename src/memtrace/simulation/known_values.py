"""Values of simulated tensors that follow from the batch and from constants: masks, positions, lengths.

Model code asks for such values to decide what to compute (`mask.all()`, `lengths.tolist()`); with them a simulation
takes the way that the real step takes. Nothing is known of what follows from weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from memtrace.simulation.operator_results import Call, map_tensors
from memtrace.simulation.results import Operator
from memtrace.simulation.tensor import begin_of, layout_of

MAX_INTEGERS = 2**20
"""Larger tensors have no known values: no model decides by them, and a mask over all pairs of positions is large."""

MAX_FLOATS = 2**17
"""The same for floating-point tensors, such as a mask of ones for each token."""


class KnownValues:
    """Real storages beside simulated ones, by the identity of the simulated storage.

    Views need no bookkeeping: a view of a known storage is known. Large tensors are left out.
    """

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._written: dict[Operator, tuple[tuple[int, str], ...]] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns a real tensor with the values of a simulated one; None where they are not known."""
        storage = self._storages.get(id(tensor.untyped_storage()))
        if storage is None:
            return None
        shape, stride, dtype = layout_of(tensor)
        real = torch.empty(0, dtype=dtype)
        return real.set_(storage, begin_of(tensor), shape, stride)

    def learn(self, tensor: torch.Tensor, real: torch.Tensor) -> None:
        """Notes the values of a simulated tensor on a storage of its own, where they are worth keeping."""
        if not _worth_keeping(tensor):
            return
        storage = tensor.untyped_storage()
        base = torch.UntypedStorage(storage.nbytes())  # type: ignore[no-untyped-call]
        self._storages[id(storage)] = base
        known = self.of(tensor)
        assert known is not None
        known.copy_(real)

    def forget(self, identity: int) -> None:
        """Forgets what was known of the storage with this `id`."""
        self._storages.pop(identity, None)

    def inputs(self, call: Call) -> list[torch.Tensor] | None:
        """Returns the values of all tensors among the arguments; None where one of them is not known."""
        values = []
        for tensor in call.inputs:
            value = self.of(tensor)
            if value is None:
                return None
            values.append(value)
        return values

    def follow(self, call: Call, answer: Any) -> None:
        """Learns from a call that was answered: what it wrote and returned is known where its inputs are."""
        values = self.inputs(call)
        written = self._written_arguments(call.operator)
        if values is None:
            self._forget_written(call)
            return
        before = {id(tensor.untyped_storage()) for tensor in call.inputs}
        fresh = [tensor for tensor in _tensors(answer) if id(tensor.untyped_storage()) not in before]
        if "empty" in call.operator._schema.name or not (written or any(_worth_keeping(tensor) for tensor in fresh)):
            return
        try:
            outputs = list(_tensors(run(call, values)))
        except NotImplementedError:  # there is no kernel for a CPU
            self._forget_written(call)
            return
        if fresh and len(fresh) == len(outputs):
            for tensor, real in zip(fresh, outputs, strict=True):
                if real.shape == tensor.shape:  # a workspace, which a fake kernel leaves empty, is no value
                    self.learn(tensor, real)

    def _forget_written(self, call: Call) -> None:
        arguments = self._written_arguments(call.operator)
        for tensor in _tensors([_argument(call, position, name) for position, name in arguments]):
            self.forget(id(tensor.untyped_storage()))

    def _written_arguments(self, operator: Operator) -> tuple[tuple[int, str], ...]:
        """Returns position and name of the arguments that the operator writes to."""
        if operator not in self._written:
            arguments = enumerate(operator._schema.arguments)
            self._written[operator] = tuple(
                (position, argument.name)
                for position, argument in arguments
                if argument.alias_info is not None and argument.alias_info.is_write
            )
        return self._written[operator]


def run(call: Call, values: Sequence[torch.Tensor]) -> Any:
    """Returns what the call returns for real tensors, given in the order of its inputs."""
    following = iter(values)

    def real(_: torch.Tensor) -> torch.Tensor:
        return next(following)

    return call.operator(*map_tensors(real, call.args), **map_tensors(real, call.kwargs))


def _worth_keeping(tensor: torch.Tensor) -> bool:
    exact = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
    return tensor.numel() <= (MAX_INTEGERS if exact else MAX_FLOATS)


def _argument(call: Call, position: int, name: str) -> Any:
    return call.args[position] if position < len(call.args) else call.kwargs.get(name)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
