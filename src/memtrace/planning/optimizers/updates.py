"""How a recipe turns gradients into new weights: directly, through master copies, or through a buffer of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from memtrace.planning.recipe import Recipe
from memtrace.sources.hooks import HookSet

MakeOptimizer = Callable[[Sequence[torch.Tensor]], torch.optim.Optimizer]


class Updates:
    """The optimizer updates the weights themselves, as in Trainer and in plain loops."""

    def __init__(self, parameters: Sequence[nn.Parameter], make_optimizer: MakeOptimizer) -> None:
        self._parameters = parameters
        self.optimizer = make_optimizer(parameters)

    def updated(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yields each trained parameter with the tensor of its own that the optimizer updates for it."""
        return zip(self._parameters, self._parameters, strict=True)

    def micro_batch_begins(self, *, last: bool) -> None:
        """Is notified of each micro batch, and whether it is the last one before the step."""

    def micro_batch_ends(self) -> None:
        """Is told where the backward pass of a micro batch is over."""

    def step(self) -> None:
        """Updates the weights."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Drops the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def close(self) -> None:
        """Takes off hooks."""


class MasterCopies(Updates):
    """The optimizer updates copies in higher precision, from gradients that are converted for the step alone.

    So do DeepSpeed (`single_partition_of_fp32_groups` in runtime/zero/stage_1_and_2.py) and Apex.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], make_optimizer: MakeOptimizer, dtype: torch.dtype) -> None:
        self._parameters = parameters
        self._masters = [parameter.detach().to(dtype).requires_grad_() for parameter in parameters]
        self.optimizer = make_optimizer(self._masters)

    def updated(self) -> Iterator[tuple[nn.Parameter, torch.Tensor]]:
        """Yields each trained parameter with its copy."""
        return zip(self._parameters, self._masters, strict=True)

    def step(self) -> None:
        """Converts the gradients, updates the copies, and copies them back to the weights."""
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                master.grad = None
                parameter.copy_(master)


class MainGradients(MasterCopies):
    """Gradients are added up in a buffer that is never freed, as in Megatron-LM (`main_grad`)."""

    def __init__(self, parameters: Sequence[nn.Parameter], make_optimizer: MakeOptimizer, dtype: torch.dtype) -> None:
        super().__init__(parameters, make_optimizer, dtype)
        self._hooks = HookSet()
        buffer = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=dtype)
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, master, flat in zip(parameters, self._masters, torch.split(buffer, sizes), strict=True):
            master.grad = flat.view_as(master)
            self._hooks.after_gradient([parameter], _adding_to(master.grad))

    def step(self) -> None:
        """Updates the copies from the buffer, and copies them to the weights."""
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self._parameters, self._masters, strict=True):
                parameter.copy_(master)

    def zero_grad(self) -> None:
        """Sets the buffer to zero."""
        for master in self._masters:
            assert master.grad is not None
            master.grad.zero_()

    def close(self) -> None:
        """Takes off hooks."""
        self._hooks.close()


def updates_of(recipe: Recipe, parameters: Sequence[nn.Parameter], make_optimizer: MakeOptimizer) -> Updates:
    """Returns how a recipe updates these parameters."""
    if recipe.master is None:
        return Updates(parameters, make_optimizer)
    kind = MainGradients if recipe.gradients_persist else MasterCopies
    return kind(parameters, make_optimizer, getattr(torch, recipe.master))


def _adding_to(main_gradient: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        main_gradient.add_(parameter.grad)
        parameter.grad = None

    return add
