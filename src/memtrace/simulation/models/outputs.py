"""What a training loop does with the output of its model: it is dropped once the loss is known, or kept."""

from __future__ import annotations

import torch
from torch import nn

from memtrace.attribution.inputs import batch_tensors


class Outputs:
    """Told of each output of a model with gradients, or of a further model without; keeps the last one where the loop
    does.

    Trainer returns the loss alone from `compute_loss`, so that the logits go before the backward pass. In a plain loop
    `out = model(**batch)` names them until the next output takes the name: in the next step.
    """

    def __init__(self, *, keeps: bool, trained: bool = True) -> None:
        self.nbytes = 0
        """Of the largest output, without its loss; storages that several tensors share count once."""
        self._keeps, self._trained = keeps, trained
        self._kept: object = None

    def saw(self, module: nn.Module, args: object, output: object) -> None:
        """A forward hook."""
        if self._trained and not torch.is_grad_enabled():
            return
        storages = {id(tensor.untyped_storage()): tensor for tensor in batch_tensors(output) if tensor.numel() > 1}
        self.nbytes = max(self.nbytes, sum(tensor.untyped_storage().nbytes() for tensor in storages.values()))
        if self._keeps:
            self._kept = output
