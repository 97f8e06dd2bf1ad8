"""Ways to update a model that are not one torch optimizer stepped by the loop, as people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

Step = Callable[[Callable[[], torch.Tensor]], None]


class Update(NamedTuple):
    """What memtrace is handed, and one step of the training: it calls the given function for each loss."""

    optimizer: Any
    step: Step


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _one_each(model: nn.Module) -> dict[nn.Parameter, torch.optim.Optimizer]:
    """One optimizer for each parameter, stepped where its gradient is accumulated."""
    optimizers = {parameter: torch.optim.AdamW([parameter], lr=1e-2) for parameter in _trained(model)}

    def update(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)
    return optimizers


def _backward(loss: Callable[[], torch.Tensor]) -> None:
    loss().backward()


def dictionary(model: nn.Module) -> Update:
    """The optimizers in a dictionary by their parameters."""
    return Update(_one_each(model), _backward)


def layer_wise_dummy(model: nn.Module) -> Update:
    """transformers' dummy for layer-wise GaLore and APOLLO, whose `step` and `zero_grad` do nothing."""
    dummy = LayerWiseDummyOptimizer(optimizer_dict=_one_each(model))

    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        dummy.step()
        dummy.zero_grad()

    return Update(dummy, step)


class ByName:
    """Holds the optimizers by the names of their parameters, as torchtune's wrapper does; it has no `step`."""

    def __init__(self, model: nn.Module, optimizers: dict[nn.Parameter, torch.optim.Optimizer]) -> None:
        self.optim_map = {name: optimizers[p] for name, p in model.named_parameters() if p in optimizers}


def held_by_name(model: nn.Module) -> Update:
    return Update(ByName(model, _one_each(model)), _backward)


def applied_by_torch(model: nn.Module) -> Update:
    """`_apply_optimizer_in_backward`: nobody but the parameters holds the optimizers."""
    _apply_optimizer_in_backward(torch.optim.AdamW, _trained(model), {"lr": 1e-2})
    return Update([], _backward)


def beside_one_of_the_loop(model: nn.Module) -> Update:
    """The first parameter has an optimizer inside the backward pass, the others one that the loop steps."""
    first, *others = _trained(model)
    inside, outside = torch.optim.AdamW([first], lr=1e-2), torch.optim.AdamW(others, lr=1e-2)

    def update(_: object) -> None:
        inside.step()
        inside.zero_grad()

    first.register_post_accumulate_grad_hook(update)

    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        outside.step()
        outside.zero_grad()

    return Update([inside, outside], step)


class Lomo(torch.optim.Optimizer):
    """Updates each parameter when the gradient of the next one comes; has no state, and no `step` of its own."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__(_trained(model), {"lr": lr})
        self.model = model
        for parameter in _trained(model):
            parameter.register_hook(self.update)

    @torch.no_grad()
    def update(self, gradient: torch.Tensor | None) -> torch.Tensor | None:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=self.defaults["lr"])
                parameter.grad = None
        return gradient

    def fused_backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.update(None)


def lomo(model: nn.Module) -> Update:
    optimizer = Lomo(model, lr=1e-2)
    return Update(optimizer, lambda loss: optimizer.fused_backward(loss()))


def plain_hooks(model: nn.Module) -> Update:
    """Descent written into hooks; the optimizer is there for its learning rate, and never stepped."""

    @torch.no_grad()
    def update(parameter: nn.Parameter) -> None:
        parameter.sub_(parameter.grad, alpha=1e-2)
        parameter.grad = None

    for parameter in _trained(model):
        parameter.register_post_accumulate_grad_hook(update)
    return Update(torch.optim.SGD(_trained(model), lr=1e-2), _backward)


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation: one gradient to climb by, one more to descend by."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(_trained(model), {"rho": 0.05})
        self.base_optimizer = torch.optim.AdamW(_trained(model), lr=1e-2)

    @torch.no_grad()
    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                self.state[parameter].setdefault("old_p", torch.empty_like(parameter)).copy_(parameter)
                parameter.add_(parameter.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.copy_(self.state[parameter]["old_p"])
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def sam(model: nn.Module) -> Update:
    """Its two steps are called, and `step` never."""
    optimizer = Sam(model)

    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        optimizer.first_step()
        loss().backward()
        optimizer.second_step()

    return Update(optimizer, step)


def sam_with_a_closure(model: nn.Module) -> Update:
    """`step` calls both, with one forward and backward pass inside it."""
    optimizer = Sam(model)

    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        optimizer.step(lambda: _backward(loss))

    return Update(optimizer, step)


class Several(torch.optim.Optimizer):
    """A torch optimizer around two others, which the loop steps one by one."""

    def __init__(self, *several: torch.optim.Optimizer) -> None:
        super().__init__([p for one in several for group in one.param_groups for p in group["params"]], {})
        self.chained = several

    def step(self, closure: Any = None) -> None:
        for one in self.chained:
            one.step()


def a_wrapper_of_two(model: nn.Module) -> Update:
    """Half of the steps go through the wrapper, half to what it wraps."""
    first, *others = _trained(model)
    wrapper, count = Several(torch.optim.AdamW([first], lr=1e-2), torch.optim.AdamW(others, lr=1e-2)), [0]

    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        count[0] += 1
        for optimizer in (wrapper,) if count[0] % 2 else wrapper.chained:
            optimizer.step()
        wrapper.zero_grad()

    return Update(wrapper, step)


class Offload:
    """Updates copies of the parameters, each with an optimizer of its own under its parameter, as torchao's does."""

    def __init__(self, model: nn.Module) -> None:
        self.optim_dict = {p: torch.optim.AdamW([p.detach().clone()], lr=1e-2) for p in _trained(model)}

    def step(self) -> None:
        for parameter, optimizer in self.optim_dict.items():
            (copied,) = optimizer.param_groups[0]["params"]
            copied.grad = parameter.grad
            optimizer.step()
            copied.grad = parameter.grad = None
            with torch.no_grad():
                parameter.copy_(copied)


def offload(model: nn.Module) -> Update:
    optimizer = Offload(model)

    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        optimizer.step()

    return Update(optimizer, step)


class Lookahead:
    """Averages with slow weights of its own every other step; no torch optimizer itself."""

    def __init__(self, fast: torch.optim.Optimizer) -> None:
        self.fast, self.state, self.param_groups = fast, {}, fast.param_groups
        self._count = 0

    @torch.no_grad()
    def step(self) -> None:
        self.fast.step()
        self._count += 1
        for parameter in self.param_groups[0]["params"]:
            slow = self.state.setdefault(parameter, {"slow": parameter.clone()})["slow"]
            if self._count % 2 == 0:
                parameter.copy_(slow.lerp_(parameter, 0.5))


def lookahead(model: nn.Module) -> Update:
    optimizer = Lookahead(torch.optim.AdamW(_trained(model), lr=1e-2))

    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        optimizer.step()
        optimizer.fast.zero_grad()

    return Update(optimizer, step)
