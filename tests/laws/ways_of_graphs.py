"""The ways in which a loop can use a graph: more than once, partly, differentiated itself, for longer than a step."""

from __future__ import annotations

import torch
from laws.life import Run


def graph_kept_and_run_twice(run: Run) -> None:
    for _ in range(2):
        loss = run.loss()
        loss.backward(retain_graph=True)
        run.look("retained")
        loss.backward()
        run.look("freed")
        run.optimizer.step()
        run.optimizer.zero_grad()
    loss = run.loss()
    loss.backward(retain_graph=True)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.look("retained over the end of the step")
    del loss
    run.look("discarded")
    run.step()


def gradients_of_gradients(run: Run) -> None:
    """A gradient penalty: the backward pass is differentiated itself; once it is left at that."""
    parameters = [*run.model.parameters()]
    for used in (True, False, True):
        loss = run.loss()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        penalty = sum(gradient.square().sum() for gradient in gradients if gradient is not None)
        run.look("graph of the gradients")
        if used:
            (loss + penalty).backward()
            run.look("backward")
            run.optimizer.step()
            run.optimizer.zero_grad()
        del gradients, penalty, loss
        run.look("gone")


def part_of_the_graph(run: Run) -> None:
    """A backward pass that ends at one parameter; the others get no gradient."""
    loss = run.loss()
    last = next(p for p in run.model.parameters() if p.requires_grad)
    torch.autograd.grad(loss, [last], retain_graph=True)
    run.look("retained")
    torch.autograd.grad(loss, [last])
    run.look("freed")
    del loss
    run.look("gone")
    run.step()


def kept_for_longer(run: Run) -> None:
    """The loop keeps losses with their graphs over several steps, then lets them go."""
    kept = []
    for _ in range(3):
        loss = run.loss()
        kept.append(loss)
        if len(kept) < 3:
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.look("kept")
    kept.clear()
    del loss
    run.look("let go")
    run.step()


def a_hook_that_replaces(run: Run) -> None:
    """Tensor hooks of the user on an activation and on a gradient, one of which raises once."""
    raising = [True]

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        if raising.pop() if raising else False:
            raise LookupError("of the user")
        return gradient * 2

    parameter = next(p for p in run.model.parameters() if p.requires_grad)
    handle = parameter.register_hook(hook)
    with run.catching(LookupError):
        run.step()
    run.look("caught")
    run.optimizer.zero_grad()
    run.step()
    handle.remove()
    run.step()
