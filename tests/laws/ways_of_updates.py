"""Ways to update that are not one optimizer stepped by the loop: inside the backward pass, or in two halves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from laws.life import Run
from torch import nn
from update_forms import Update, applied_by_torch, dictionary, layer_wise_dummy, lomo, sam

FORMS = (dictionary, layer_wise_dummy, applied_by_torch, lomo, sam)


def steps_of_another_form(run: Run, form: Callable[[nn.Module], Update]) -> None:
    """Another model with updates of its own: whole steps, one that fails in its backward pass, one that is begun anew,
    a loss that is discarded; then all of it is dropped."""
    model = run.build()
    loss = partial(run.loss, model)
    optimizer, step = form(model)
    with run.watch(model, optimizer):
        for _ in range(4):
            step(loss)
            run.look("after a step")
        with run.catching(torch.OutOfMemoryError), run.failing("backward", torch.OutOfMemoryError):
            step(loss)
        run.look("caught")
        for parameter in model.parameters():
            parameter.grad = None
        step(loss)
        run.look("begun anew")
        discarded = loss()
        run.look("a loss")
        del discarded
        run.look("discarded")
        step(loss)
    run.look("unwatched")
    del model, optimizer, step, loss
    run.look("dropped")
    run.step()
