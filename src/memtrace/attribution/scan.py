"""One look at everything that lives longer than a step: what the ledger is filled from."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from memtrace.attribution.engines import Engine, find_engines
from memtrace.attribution.gradients import GradientCount, gradient_bytes
from memtrace.attribution.hidden import HiddenBuffers
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.contents import (
    Role,
    check_model,
    claim_gradients,
    claim_model,
    device_of,
    devices_of,
)
from memtrace.attribution.models.further import FurtherModels
from memtrace.attribution.models.held import Held
from memtrace.attribution.optimizers.claims import claim_kept_elsewhere, claim_optimizers
from memtrace.attribution.optimizers.finding import HandedOver, find_optimizers, flat, optimizer_parameters
from memtrace.attribution.storages import canonical_device
from memtrace.attribution.timeline import Lifetime
from memtrace.errors import ConfigError
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category
from memtrace.record.limitations import Limitation, further_devices
from memtrace.sources.autograd_torch_private import optimizers_in_backward
from memtrace.sources.cuda.cublas import workspace_sizes
from memtrace.sources.gradient_hooks import others_take_gradient

logger = logging.getLogger("memtrace")


class Scan:
    """A model, the optimizers that really step, and the engines between them.

    Optimizers are held weakly: one that the user replaces and drops takes its state along.

    Args:
        model: the module that is trained, wrapped by an engine or not.
        optimizers: one optimizer or several, as the user has them: in lists or dictionaries, wrapped or not. Of those
            that a framework has handed over (`HandedOver`), one that cannot be used is logged and left out.
        engines: engines that cannot be found from these, such as simulated ones.
        further: the models beside the trained one.

    Raises:
        ConfigError: there is no optimizer, the model has no parameters, or an optimizer updates neither the model nor
            copies of its parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Any,
        engines: Sequence[Engine] = (),
        further: FurtherModels | None = None,
    ) -> None:
        check_model(model)
        self._model = model
        self._further = further or FurtherModels()
        modules = list(model.modules())
        self._held = Held(modules)
        self.walks = 1
        """Walks over the model so far: what is known of it may be another after each."""
        given = [*flat(optimizers), *optimizers_in_backward(self._held.parameters())]
        self.engines = [*engines, *find_engines(model, given, modules)]
        found = find_optimizers(
            given,
            model,
            lambda optimizer: any(engine.owns(optimizer) for engine in self.engines),
            parameters=self._held.parameters(lazy=True),
        )
        odd = found.odd or ([] if found.stepping else ["there is none"])
        if odd and not isinstance(optimizers, HandedOver):
            raise ConfigError("a tracer needs at least one optimizer, got none" if not found.odd else odd[0])
        if odd and self.device:  # a model without a device is the greater trouble, and raises first
            logger.warning("memtrace: the optimizer cannot be followed, its state is not counted: %s", "; ".join(odd))
        self._given, self._states, self._chained = _weakly(given), _weakly(found.holding), _weakly(found.chained)
        self._stepping = _weakly(found.stepping)
        self._parts = {wrapper: _weakly(parts) for wrapper, parts in found.parts.items()}
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            logger.warning(
                "memtrace: nn.DataParallel runs replicas of the model on %d devices: only %s is followed",
                len(model.device_ids),
                self.device,
            )
        accelerators = [device for device in devices_of(self._held.parameters()) if device.type != "cpu"]
        others = [device for device in accelerators if device != self.device]
        self._further_devices = further_devices(self.device, others) if others else None
        self._looked_in_forward = False
        self._sizes: list[int] = []
        self._states_held: list[int] = []
        self._requested: int | None = None
        """What was allocated at the end of the last step; None where nothing tells."""
        self.workspaces: Sequence[int] | None = None
        """Sizes of the blocks that cuBLAS may hold, in bytes; None where the device is to be asked."""
        self._gradients: GradientCount | None = None
        self._in_buffers: list[GradientCount] | None = None
        """What counts the gradients that are views of an engine's buffers, one for each module of these."""
        self._without_gradient: set[int] = set()
        """Identities of the parameters that had no gradient when the last backward pass had ended."""

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers whose steps are counted, without those that are gone; of wrappers the outermost."""
        return _alive(self._stepping)

    def parts_of(self, optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
        """Returns the optimizers that one of these wraps: where the loop steps all of them, it has stepped itself."""
        return _alive(self._parts.get(id(optimizer), ()))

    @property
    def device(self) -> torch.device:
        """The device that computes: an engine's, else the one that holds most of the parameters' bytes."""
        for engine in self.engines:
            if engine.device is not None:
                return canonical_device(engine.device)
        held = self.held
        return canonical_device(device_of(held.parameters() or held.parameters(lazy=True)))

    @property
    def held(self) -> Held:
        """What the last walk over the model has found; another walk is made where some of that has gone."""
        if not self._held.is_whole:
            self._look()
        return self._held

    @property
    def prepares_gradients(self) -> bool:
        """Whether an engine converts gradients between the last one and the step of the optimizer."""
        return any(engine.prepares_gradients for engine in self.engines)

    def look_in_forward(self) -> None:
        """Looks for engines once more, in the first forward pass: a model does not know a wrapper around it."""
        if not self._looked_in_forward:
            self._looked_in_forward = True
            self.engines = self.engines or find_engines(self._model, _alive(self._given))

    @property
    def limitations(self) -> list[Limitation]:
        """What cannot be read of the engines that are there, and of further devices."""
        of_engines = [engine.limitation for engine in self.engines if engine.limitation is not None]
        return of_engines if self._further_devices is None else [*of_engines, self._further_devices]

    def claim_persistent(self, ledger: Ledger, *, anew: bool = True) -> None:
        """Claims weights, buffers, master weights, optimizer state, the engines' tensors and the gradients of now.

        Costs about 1 us for each storage: it is run when a tracer is attached, around each traced step, and after a
        step in which an optimizer has made new state.

        Args:
            ledger: where to claim.
            anew: whether to walk over the model; False where that was done a moment ago, in the same step.
        """
        if anew:
            self._look()
        self._gradients = self._in_buffers = None
        self._further.claim(ledger, self.role_of, self.held)
        ledger.has_lost = False
        for engine in self.engines:
            engine.claim(ledger)
        parameters = claim_model(self.held, ledger, self.role_of)
        self._claim_optimizers(parameters, ledger)
        claim_gradients(self._gradient_owners(parameters), ledger)
        claim_kept_elsewhere(_alive(self._chained), ledger)

    def claim_gradients(self, ledger: Ledger) -> None:
        """Claims `.grad` of the model's parameters and of master copies that optimizers hold, and the engines' own."""
        for engine in self.engines:
            engine.claim(ledger)
        claim_gradients(self._gradient_owners(self.held.parameters()), ledger)

    def claim_gradients_of(self, optimizer: torch.optim.Optimizer, ledger: Ledger) -> None:
        """Claims the gradients that one optimizer is about to use, of the many that step inside a backward pass."""
        claim_gradients(optimizer_parameters(optimizer), ledger)

    def claim_passing(self, ledger: Ledger) -> None:
        """Claims the buckets that engines have for a part of a step only; nothing where there is no engine."""
        for engine in self.engines:
            engine.claim_passing(ledger)

    def saved_as(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the parameter that must be saved for backward in place of this tensor; mostly None."""
        for engine in self.engines:
            parameter = engine.saved_as(tensor)
            if parameter is not None:
                return parameter
        return None

    def gradient_bytes(self, device: torch.device) -> dict[EntryKey, int]:
        """Returns the bytes of the gradients that exist now, by element type, without touching the ledger.

        Of the parameters that the last look at everything has found. Buffers that gradients are views of count as
        gradients also when the loop has dropped these.
        """
        found = self._gradients_of_now(device)
        buffers = [each for engine in self.engines for each in engine.gradient_buffers()]
        if not buffers:
            return found
        if self._in_buffers is None:
            self._in_buffers = [
                GradientCount(map(self.held.reference_to, module.parameters()), device) for _, module in buffers
            ]
        for (held, _), views in zip(buffers, self._in_buffers, strict=True):
            dropped = held.nbytes - sum(views.count().values())
            if dropped > 0:
                key = EntryKey(*held.tag)
                found = {**found, key: found.get(key, 0) + dropped}
        return found

    def _gradients_of_now(self, device: torch.device) -> dict[EntryKey, int]:
        of_engines = [gradient for engine in self.engines for gradient in engine.gradients()]
        if of_engines:  # views of the same storages among them
            owners = self._gradient_owners(self.held.parameters())
            of_owners = [owner.grad for owner in owners if owner.grad is not None]
            return gradient_bytes([*of_owners, *of_engines], device)
        if self._gradients is None or self._gradients.device != device:
            held = self.held
            owners = self._gradient_owners(held.parameters())
            self._gradients = GradientCount(map(held.reference_to, owners), device)
        return self._gradients.count(self._requested)

    def backward_ended(self, ledger: Ledger) -> None:
        """Claims the gradients that a backward pass has left, and notes which parameters have none."""
        self._without_gradient = {id(parameter) for parameter in self.held.parameters() if parameter.grad is None}
        self.claim_gradients(ledger)

    def gradient_leaves(self) -> Iterator[nn.Parameter]:
        """Yields every tensor that autograd accumulates a gradient into."""
        yield from self.held.parameters()
        for engine in self.engines:
            yield from engine.gradient_leaves()

    def passing_gradients(self) -> Iterator[nn.Parameter]:
        """Yields each tensor whose gradient may be gone when the backward pass has ended.

        An engine may take it, or whoever has a hook on it (optimizers that step inside the backward pass), or nobody
        knows who: then there was none at the end of the last backward pass. Engines may still be found in the first
        forward pass.
        """
        if self.engines or not self._looked_in_forward:
            yield from self.gradient_leaves()
            return
        for parameter in self.held.parameters():
            if id(parameter) in self._without_gradient or others_take_gradient(parameter):
                yield parameter

    def taken(self) -> nn.Parameter | None:
        """Returns a parameter with a hook on its gradient, where there is one and no gradient is left anywhere."""
        parameters = [parameter for parameter in self.held.parameters() if parameter.requires_grad]
        if any(parameter.grad is not None for parameter in parameters):
            return None
        return next(filter(others_take_gradient, parameters), None)

    def gathering(self) -> Iterator[tuple[Engine, nn.Module]]:
        """Yields each module whose weights an engine puts together for its forward pass, with the engine."""
        for engine in self.engines:
            for module in engine.gathering_modules():
                yield engine, module

    def hidden(self) -> Sequence[HiddenBuffers]:
        """Returns what engines say about blocks that no Python object refers to."""
        return [hidden for engine in self.engines for hidden in engine.hidden_buffers()]

    def recognise(self, lifetimes: Sequence[Lifetime], ledger: Ledger) -> None:
        """Tags the blocks of a window that nobody claims and that further models hold."""
        self._further.recognise(lifetimes, ledger, self._model)

    def hidden_bytes(self) -> dict[EntryKey, int]:
        """Returns the bytes of those blocks that there are now."""
        found: dict[EntryKey, int] = {}
        for hidden in self.hidden():
            key = EntryKey(*hidden.tag)
            found[key] = found.get(key, 0) + hidden.nbytes
        return found

    def workspace_sizes(self) -> Sequence[int]:
        """Returns the sizes of the blocks that cuBLAS may hold on the device."""
        if self.workspaces is None:
            self.workspaces = workspace_sizes(self.device)
        return self.workspaces

    @property
    def ends_with_any(self) -> bool:
        """Whether a step of the training is over as soon as any optimizer has stepped: there is one, and no engine."""
        return len(self.optimizers) == 1 and not self.engines

    @property
    def has_state(self) -> bool:
        """Whether an optimizer has state for any parameter."""
        return any(optimizer.state for optimizer in _alive(self._states))

    def keep_up(self, ledger: Ledger, requested_bytes: int | None = None) -> bool:
        """Claims everything anew where the model or an optimizer holds something else than when it was last claimed.

        That is: another module, another storage in the place of one, new state, another parameter group. A state whose
        storage somebody else keeps when it is replaced does not tell.

        Args:
            ledger: where to claim.
            requested_bytes: what was allocated at the end of the step, where the allocator counts it. Neither model nor
                state nor gradients are looked at where that is as before and nothing has died: nothing was added then,
                and what was swapped with something as large is seen by the next trace.

        Returns:
            Whether there is something new.
        """
        steady, self._requested = requested_bytes is not None and requested_bytes == self._requested, requested_bytes
        holding = _alive(self._states)
        sizes = [size for optimizer in holding for size in _sizes(optimizer)]
        states = self._states_held if steady else [*map(_states_of, holding)]
        as_before = sizes == self._sizes and states == self._states_held and not ledger.has_lost
        if as_before and (steady or self._held.is_as_walked):
            return False
        self._sizes, self._states_held = sizes, states
        if not ledger.keeps_journal:  # a window has noted what there was before
            ledger.clear(keep=Category.INPUTS)
        self.claim_persistent(ledger)
        return True

    def claim_kept(self, ledger: Ledger) -> None:
        """Claims the buffers of engines that are there at the end of a step; nothing where there is no engine."""
        for engine in self.engines:
            engine.claim_kept(ledger)

    def _look(self) -> None:
        self._held = Held(self._model.modules())
        self.walks += 1

    def _claim_optimizers(self, parameters: Sequence[torch.Tensor], ledger: Ledger) -> None:
        claim_optimizers(_alive(self._states), parameters, ledger)

    def _gradient_owners(self, parameters: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
        """Returns the model's parameters and what else the optimizers update: master copies have gradients too."""
        tensors = chain(parameters, *map(optimizer_parameters, self.optimizers))
        return {id(tensor): tensor for tensor in tensors}.values()

    def updates(self, optimizer: torch.optim.Optimizer) -> int:
        """Returns how often the optimizer steps in one step of the training."""
        for engine in self.engines:
            if engine.owns(optimizer):
                return engine.updates_per_step(optimizer)
        return 1

    def role_of(self, parameter: torch.Tensor) -> Role | None:
        """Returns what an engine says that the storage of a parameter is for now; None for plain weights."""
        for engine in self.engines:
            role = engine.role_of(parameter)
            if role is not None:
                return role
        return None


def _sizes(optimizer: torch.optim.Optimizer) -> Iterator[int]:
    """Yields how many parameters and states an optimizer holds: what changes where it gets more of either."""
    yield from (len(group["params"]) for group in optimizer.param_groups)
    yield len(optimizer.state)


def _states_of(optimizer: torch.optim.Optimizer) -> int:
    """Returns how many states of all parameters an optimizer holds."""
    try:
        return sum(map(len, optimizer.state.values()))
    except TypeError:  # a state that has no length
        return 0


def _weakly(objects: Iterable[Any]) -> list[Callable[[], Any]]:
    return [*map(weakref.ref, objects)]


def _alive(references: Iterable[Callable[[], Any]]) -> list[Any]:
    return [found for reference in references if (found := reference()) is not None]
