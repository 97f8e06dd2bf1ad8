"""What an operator returns for given layouts, asked once from torch's fake kernels and remembered.

A deep model repeats the same few hundred calls: each of them costs a fake kernel (50 us and more) once, then 1 us.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memtrace.simulation import torch_fake
from memtrace.simulation.kernels import Target, asked_layouts, corrected
from memtrace.simulation.results import Constant, NewTensor, Operator, Result, Same, Several, ViewOf
from memtrace.simulation.tensor import DEVICE, Layout, begin_of, layout_of

_AS_STRIDED = torch.ops.aten.as_strided.default
_SLICE = torch.ops.aten.slice.Tensor
_ON_LISTS = ("aten::_foreach_", "aten::_fused_")
"""Beginnings of the names of operators that treat the elements of their lists one by one."""


@dataclass(slots=True)
class Call:
    """One call of an operator."""

    operator: Operator
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    inputs: list[torch.Tensor]
    """Every tensor among the arguments, in order; one that is given twice is there twice."""
    key: tuple[Any, ...]
    """Equal for calls with the same results: layouts of the tensors, and all other arguments but devices."""

    @classmethod
    def of(cls, operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Returns the call with these arguments."""
        inputs: list[torch.Tensor] = []
        parts: list[Any] = [operator]
        _read(args, parts, inputs)
        if kwargs:
            _read(kwargs.items(), parts, inputs)
        return cls(operator, args, kwargs, inputs, tuple(parts))


class OperatorResults:
    """The memory of what operators return on one kind of device. Simulations of the same target may share it."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._known: dict[Any, Result] = {}
        self._fake = torch_fake.fake_kernels()

    def __len__(self) -> int:
        return len(self._known)

    def of(self, call: Call) -> Result:
        """Returns what a call returns.

        Raises:
            RuntimeError: the operator refuses the arguments (`torch_fake.DATA_DEPENDENT` where the result depends on
                values, `torch_fake.UNSUPPORTED` where nobody knows it).
        """
        found = self._known.get(call.key)
        if found is None:
            if call.operator is _AS_STRIDED:
                return _strided_view(*call.args, **call.kwargs)
            if call.operator is _SLICE:  # flat buffers are cut at other places for each parameter
                return _slice(*call.args, **call.kwargs)
            if call.operator._schema.name.startswith(_ON_LISTS):
                found = self._of_lists(call)
            elif call.operator.namespace == "c10d":
                found = _of_ranks(call)
            else:
                found = self._ask(call.operator, call.args, call.kwargs)
            self._known[call.key] = found
        return found

    def _of_lists(self, call: Call) -> Result:
        """Returns the result of an operator that treats the elements of its lists one by one.

        Each kind of element is asked for once: a model of 100 layers has some ten kinds among 1,000 parameters.
        """
        if not call.operator._schema.returns:
            return Constant(None)
        arguments: dict[int | str, Any] = dict(enumerate(call.args)) | dict(call.kwargs)
        count = len(call.args[0])
        kinds: dict[Any, Result] = {}
        items: list[Result] = []
        for position in range(count):
            one = {name: _pick(value, position, count) for name, value in arguments.items()}
            parts: list[Any] = []
            _read(one.values(), parts, [])
            key = tuple(parts)
            if key not in kinds:
                asked = self._ask(
                    call.operator,
                    [value for name, value in one.items() if isinstance(name, int)],
                    {name: value for name, value in one.items() if isinstance(name, str)},
                )
                assert isinstance(asked, Several)
                kinds[key] = asked.items[0]
            items.append(kinds[key])
        return Several(list, tuple(items))

    def _ask(self, operator: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
        inputs: list[torch.Tensor] = []
        _read((*args, *kwargs.values()), [], inputs)
        layouts = [layout_of(tensor) for tensor in inputs]
        with self._fake, torch_fake.quiet():
            fakes = [
                torch.empty_strided(shape, stride, dtype=dtype, device=DEVICE)
                for shape, stride, dtype in asked_layouts(operator, layouts)
            ]
            following = iter(fakes)
            fake_args = map_tensors(lambda _: next(following), args)
            fake_kwargs = map_tensors(lambda _: next(following), kwargs)
            result = operator(*fake_args, **fake_kwargs)
        return corrected(self.target, operator, layouts, _describe(result, list(fakes)))


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Returns the value with every tensor in nested lists, tuples and dicts replaced, in their order."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {name: map_tensors(function, item) for name, item in value.items()}
    return value


def _of_ranks(call: Call) -> Result:
    """Returns what a collective returns: the process group is asked, with empty tensors, since fake ranks move nothing.

    Of torch's own kernels without memory for collectives there are none in 2.6, and from 2.11 on only those that are
    always loaded.
    """
    empty = [torch.empty(0, dtype=tensor.dtype) for tensor in call.inputs]
    following = iter(empty)
    args = map_tensors(lambda _: next(following), call.args)
    kwargs = map_tensors(lambda _: next(following), call.kwargs)
    return _describe(call.operator(*args, **kwargs), empty)


def _read(values: Iterable[Any], parts: list[Any], tensors: list[torch.Tensor]) -> None:
    """Appends to `parts` what the result of a call depends on, and its tensors to `tensors`."""
    for value in values:
        kind = type(value)
        if kind is int or value is None:  # most are, and torch is asked whether something is a tensor
            parts.append(value)
        elif isinstance(value, torch.Tensor):
            tensors.append(value)
            parts.append(layout_of(value))
        elif isinstance(value, (list, tuple)):
            inner: list[Any] = []
            _read(value, inner, tensors)
            parts.append(tuple(inner))
        elif isinstance(value, (bool, float)):  # True, 1 and 1.0 are equal and make other element types
            parts.append((kind, value))
        elif not isinstance(value, torch.device):
            parts.append(value)


def _strided_view(
    tensor: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> ViewOf:
    """Returns the result of `as_strided`, the one view whose offset counts from the beginning of the storage."""
    offset = 0 if storage_offset is None else storage_offset - begin_of(tensor)
    return ViewOf(0, Layout(tuple(size), tuple(stride), tensor.dtype), offset)


def _slice(
    tensor: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> ViewOf:
    """Returns the result of a slice, whose ends may lie beyond the tensor, or count from its end."""
    shape, stride = list(tensor.shape), list(tensor.stride())
    first, last, _ = slice(start, end).indices(shape[dim])
    shape[dim] = len(range(first, last, step))
    offset = first * stride[dim]
    stride[dim] *= step
    return ViewOf(0, Layout(torch.Size(shape), tuple(stride), tensor.dtype), offset)


def _pick(value: Any, position: int, count: int) -> Any:
    """Returns a list of `count` elements cut down to the one at `position`; anything else as it is."""
    return [value[position]] if isinstance(value, (list, tuple)) and len(value) == count else value


def _describe(value: Any, tensors: list[torch.Tensor]) -> Result:
    """Returns the description of a fake result; new tensors are appended to `tensors`, which begin as the inputs."""
    if isinstance(value, (list, tuple)):
        return Several(type(value), tuple(_describe(item, tensors) for item in value))
    if not isinstance(value, torch.Tensor):
        return Constant(value)
    for position, tensor in enumerate(tensors):
        if tensor is value:
            return Same(position)
    storage = value.untyped_storage()
    result: Result = NewTensor(layout_of(value), storage.nbytes(), begin_of(value))
    for position, tensor in enumerate(tensors):
        if tensor.untyped_storage() is storage:
            begin = begin_of(tensor) * tensor.element_size() // value.element_size()
            result = ViewOf(position, layout_of(value), begin_of(value) - begin)
            break
    tensors.append(value)
    return result
