"""One look at everything that lives longer than a step: what the ledger is filled from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.model import claim_gradients, claim_model
from memtrace.attribution.optimizers import claim_optimizer, optimizer_parameters


def claim_persistent(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ledger: Ledger) -> None:
    """Claims weights, buffers, master weights, optimizer state and the gradients that exist now.

    Costs about 1 us for each storage: it is run when a tracer is attached, around each traced step, and after a step
    in which an optimizer has made new state.
    """
    claim_model(model, ledger)
    for optimizer in optimizers:
        claim_optimizer(optimizer, model, ledger)
    claim_all_gradients(model, optimizers, ledger)


def claim_all_gradients(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ledger: Ledger) -> None:
    """Claims `.grad` of the model's parameters and of master copies that optimizers hold."""
    claim_gradients(model.parameters(), ledger)
    for optimizer in optimizers:
        claim_gradients(optimizer_parameters(optimizer), ledger)
