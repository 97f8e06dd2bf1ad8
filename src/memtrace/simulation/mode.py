"""The mode in which a training step runs on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memtrace.errors import PlanError
from memtrace.simulation import torch_fake
from memtrace.simulation.events import SimulatedEvents
from memtrace.simulation.kernels import Target, scratch_bytes
from memtrace.simulation.known_values import KnownValues, run
from memtrace.simulation.operator_results import Call, OperatorResults, map_tensors
from memtrace.simulation.results import Constant, NewTensor, Operator, Result, Same, ViewOf
from memtrace.simulation.sharded_lists import without_wrappers, wrapped
from memtrace.simulation.tensor import (
    DEVICE,
    SimulatedStorage,
    SimulatedTensor,
    begin_of,
    layout_of,
    new_tensor,
    tensor_on,
)

_ADD = torch.ops.aten.add.Tensor
MAX_OPERATORS = 600_000
"""Operators after which a simulation gives up, some 15 seconds: a layer of a transformer takes 300 in two steps."""

_LIFT = torch.ops.aten.lift_fresh.default
_PLAIN_VALUES = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default})
"""Operators that return a value of Python, and always depend on values."""


_SIMULATED = frozenset({SimulatedTensor})


class _Block(weakref.ref[torch.UntypedStorage]):
    """A weak reference to a simulated storage, with its address on the device; None where it takes no block there."""

    __slots__ = ("address", "host_bytes", "identity")

    address: int | None
    host_bytes: int
    """What it takes of the host's memory, where it was put there."""
    identity: int


class Simulation(torch_fake.DispatchMode):  # type: ignore[no-untyped-call]
    """Runs torch on tensors without memory, and turns every block that real tensors would take into events.

    Operators below autograd are answered with tensors of the right layout, so that model code, autograd,
    checkpointing, autocast and optimizers run as they are. Costs about 15 us an operator.

    Args:
        target: the kind of device whose kernels are simulated.
        results: what other simulations have learned of that kind, to be used and added to.

    Raises:
        PlanError: an operator depends on values that are not known, or nobody knows what it returns.
    """

    def __init__(self, target: Target = Target.CPU, results: OperatorResults | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._target = target
        self._guesses = False
        self.operators = 0
        """How many have run."""
        self.kinds: set[Operator] = set()
        """Which have run."""
        self.events = SimulatedEvents(self._address_of)
        self._on_host = False
        self.host_bytes = 0
        """What is in the memory of the host now, of what was put there."""
        self._blocks: dict[int, _Block] = {}
        self._results = OperatorResults(target) if results is None else results
        assert self._results.target is target, "results of another kind of device"
        self._known = KnownValues()
        self._adopted: dict[int, torch.UntypedStorage] = {}
        """What stands for the storages of real tensors that were met, by the identity of the real one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False: nothing is compiled here, and keeping the compiler out costs 5 us an operator."""
        return False

    @contextmanager
    def guessing(self) -> Iterator[None]:
        """Answers 1 where an unknown number is asked for: optimizers scale by norms, and no size follows from them."""
        self._guesses = True
        try:
            yield
        finally:
            self._guesses = False

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Gives every new tensor a place in the memory of the host, which is counted apart."""
        before, self._on_host = self._on_host, True
        try:
            yield
        finally:
            self._on_host = before

    def to_host(self, tensor: torch.Tensor) -> None:
        """Moves the storage of a simulated tensor to the host, with all that share it."""
        storage = tensor.untyped_storage()
        block = self._blocks[id(storage)]
        if block.address is not None:
            self.events.free(block.address)
            block.address = None
            self._count_for_host(block, storage.nbytes())

    def _count_for_host(self, block: _Block, nbytes: int) -> None:
        block.host_bytes = nbytes
        self.host_bytes += nbytes

    def adopt(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a simulated tensor in place of a real one or one on the meta device; a simulated one as it is.

        Tensors that share a storage still do. Values of small tensors are kept. A single number
        that Python code made (an optimizer's step count) stays on the host where the target is CUDA: it takes no block.
        """
        if isinstance(tensor, SimulatedTensor):
            return tensor
        with torch_fake.without_dispatch():
            return self._adopt(tensor)

    def _adopt(self, tensor: torch.Tensor) -> SimulatedTensor:
        storage = tensor.untyped_storage()
        layout, offset = layout_of(tensor), begin_of(tensor)
        if id(storage) in self._adopted:
            return tensor_on(self._adopted[id(storage)], layout, offset)
        on_host = self._target is Target.CUDA and tensor.dim() == 0 and not tensor.is_meta
        adopted = self._new(NewTensor(layout, storage.nbytes(), offset), on_device=not on_host)
        self._adopted[id(storage)] = adopted.untyped_storage()
        weakref.finalize(storage, self._adopted.pop, id(storage), None)
        if not tensor.is_meta:
            self._known.learn(adopted, tensor)
        return adopted

    def adopt_module(self, module: nn.Module) -> None:
        """Puts simulated tensors in place of all parameters and buffers; shared ones stay shared."""
        replaced: dict[int, torch.Tensor] = {}
        for owner in module.modules():
            for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
                if id(tensor) not in replaced:
                    replaced[id(tensor)] = self._adopt_member(tensor)
                setattr(owner, name, replaced[id(tensor)])

    def _adopt_member(self, tensor: torch.Tensor) -> torch.Tensor:
        adopted = self.adopt(tensor.detach())
        if not isinstance(tensor, nn.Parameter):
            return adopted
        with self:
            parameter = nn.Parameter(adopted, requires_grad=tensor.requires_grad)
        vars(parameter).update(vars(tensor))
        return parameter

    def __torch_dispatch__(
        self,
        func: Operator,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch_fake.DEVICE_OF:  # two of three calls
            return DEVICE
        with torch_fake.without_function_modes():
            return self._dispatched(func, types, args, kwargs)

    def _dispatched(
        self, func: Operator, types: Sequence[type], args: Sequence[Any], kwargs: Mapping[str, Any] | None
    ) -> Any:
        if func.namespace == "profiler" or torch_fake.fake_mode_is_on():
            return func(*args, **(kwargs or {}))
        if types.count(SimulatedTensor) != len(types):
            return self._of_wrappers(func, args, kwargs or {})
        self.operators += 1
        self.kinds.add(func)
        if self.operators > MAX_OPERATORS:
            raise PlanError(
                f"the step takes more than {MAX_OPERATORS:,} operators, as code does that goes through positions one "
                "by one: plan a shorter sequence or fewer layers"
            )
        if func is _ADD and torch_fake.is_engine_sum(args[0]) and layout_of(args[0]) == layout_of(args[1]):
            return tensor_on(args[0].untyped_storage(), layout_of(args[0]), begin_of(args[0]))
        call = Call.of(func, args, kwargs or {})
        if not _SIMULATED.issuperset(map(type, call.inputs)):
            call = Call.of(func, map_tensors(self.adopt, args), map_tensors(self.adopt, kwargs or {}))
        if func is _LIFT:
            return call.inputs[0]
        return self._answer(call)

    def _of_wrappers(self, func: Operator, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Returns the answer to a call with other tensors than simulated ones, as far as it is not left to them.

        A wrapper such as DTensor calls again with the tensors that it wraps. For lists it is asked for time that grows
        with the square of their length.
        """
        inner = without_wrappers(func, args, kwargs)
        if inner is None:
            return NotImplemented
        answer = self._dispatched(func, (SimulatedTensor,), inner, kwargs)
        if answer is None:
            return None
        with self:
            return wrapped(answer, args)

    def _answer(self, call: Call) -> Any:
        if call.operator in _PLAIN_VALUES:
            return self._by_value(call, None)
        try:
            result = self._results.of(call)
        except torch_fake.DATA_DEPENDENT as error:
            return map_tensors(self._stand_in, self._by_value(call, error))
        except torch_fake.UNSUPPORTED as error:
            raise PlanError(
                f"{call.operator} cannot be simulated: torch has no fake kernel for it ({error})"
            ) from error
        answer = self._build(result, call, list(call.inputs))
        scratch = scratch_bytes(self._target, call.operator, call.inputs)
        if scratch:
            self.events.free(self.events.allocate(scratch))
        self._known.follow(call, answer)
        return answer

    def _by_value(self, call: Call, error: Exception | None) -> Any:
        """Returns the real result of a call that depends on values."""
        values = self._known.inputs(call)
        if values is None and self._guesses and call.operator in _PLAIN_VALUES:
            return torch.ones((), dtype=call.inputs[0].dtype).item()
        if values is None:
            raise PlanError(
                f"{call.operator} depends on values that a simulation does not have (those of weights and activations):"
                " choose an implementation whose shapes do not depend on the data, such as "
                "experts_implementation='batched_mm' for a mixture of experts"
            ) from error
        return run(call, values)

    def _stand_in(self, real: torch.Tensor) -> SimulatedTensor:
        tensor = self._new(NewTensor(layout_of(real), real.untyped_storage().nbytes(), begin_of(real)))
        self._known.learn(tensor, real)
        return tensor

    def _build(self, result: Result, call: Call, tensors: list[torch.Tensor]) -> Any:
        """Returns what a description describes; `tensors` are the inputs, and what was built so far."""
        if isinstance(result, NewTensor):
            tensors.append(self._new(result))
            return tensors[-1]
        if isinstance(result, ViewOf):
            base, layout = tensors[result.position], result.layout
            begin = begin_of(base) * base.element_size() // layout.dtype.itemsize
            tensors.append(tensor_on(base.untyped_storage(), layout, begin + result.offset))
            return tensors[-1]
        if isinstance(result, Same):
            if torch.Tag.inplace_view in call.operator.tags:
                with torch_fake.without_dispatch():
                    call.operator(*call.args, **call.kwargs)
            return tensors[result.position]
        if isinstance(result, Constant):
            return result.value
        return result.kind(self._build(item, call, tensors) for item in result.items)

    def _new(self, description: NewTensor, *, on_device: bool = True) -> SimulatedTensor:
        tensor = new_tensor(description.layout, description.nbytes, self._resized, description.offset)
        storage = tensor.untyped_storage()
        block = _Block(storage, self._died)
        block.identity, block.host_bytes = id(storage), 0
        block.address = None
        if description.nbytes and self._on_host:
            self._count_for_host(block, description.nbytes)
        elif description.nbytes and on_device:
            block.address = self.events.allocate(description.nbytes)
        self._blocks[block.identity] = block
        return tensor

    def _resized(self, storage: SimulatedStorage) -> None:
        """Frees or allocates the block of a storage that was resized to nothing or back, as FSDP2 does."""
        block = self._blocks[id(storage)]
        if block.address is not None and not storage.nbytes():
            self.events.free(block.address)
            block.address = None
        elif block.address is None and storage.nbytes() and not block.host_bytes:
            block.address = self.events.allocate(storage.nbytes())

    def _died(self, block: weakref.ref[torch.UntypedStorage]) -> None:
        assert isinstance(block, _Block)
        del self._blocks[block.identity]
        self._known.forget(block.identity)
        self.host_bytes -= block.host_bytes
        if block.address is not None:
            self.events.free(block.address)

    def _address_of(self, storage: torch.UntypedStorage) -> int:
        """Returns the address of a simulated storage; 0, which no block has, for any other."""
        block = self._blocks.get(id(storage))
        return block.address or 0 if block is not None else 0
