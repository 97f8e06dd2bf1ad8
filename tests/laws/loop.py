"""A plain training loop over one row of the table, written without memtrace."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from laws.families import Combination, Recipe


class Loop:
    """Model, master copies and optimizer of one combination.

    The master copies are made by hand, as people do it in plain loops: the optimizer holds float32 copies, gradients
    are copied up before its step and weights down after it.
    """

    def __init__(self, combination: Combination) -> None:
        self.combination = combination
        self.model = combination.build()
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.masters: list[torch.Tensor] = []
        if combination.recipe is Recipe.BF16_MASTER:
            self.masters = [parameter.detach().float().requires_grad_() for parameter in self.trainable]
        self.optimizer = torch.optim.AdamW(self.masters or self.trainable, lr=1e-2)

    def kept_by_modules(self) -> int:
        """Returns the bytes of tensors that modules have as plain attributes, and that nobody claims.

        Before transformers 5 rotary embeddings keep the frequencies that they were built with beside the buffer.
        """
        model = [*self.model.parameters(), *self.model.buffers()]
        claimed = {tensor.untyped_storage().data_ptr() for tensor in model}
        values = [value for module in self.model.modules() for value in vars(module).values()]
        kept = {value.untyped_storage().data_ptr(): value for value in values if isinstance(value, torch.Tensor)}
        return sum(tensor.untyped_storage().nbytes() for start, tensor in kept.items() if start not in claimed)

    def step(self) -> list[torch.Tensor]:
        """Runs one step and returns its losses, one a micro batch; gradients stay until the next one."""
        self.zero_grad()
        losses = [self._micro_step() for _ in range(self.combination.way.micro_batches)]
        for parameter, master in zip(self.trainable, self.masters, strict=False):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(self.trainable, self.masters, strict=False):
                parameter.copy_(master)
        return losses

    def zero_grad(self) -> None:
        """Drops the gradients of the model and of the master copies."""
        self.model.zero_grad()
        self.optimizer.zero_grad()

    def _micro_step(self) -> torch.Tensor:
        batch = self.combination.batch()
        with self._precision():
            loss = self.combination.family.loss(self.model, batch)
        loss.backward()
        return loss.detach()

    def _precision(self) -> AbstractContextManager[object]:
        if self.combination.recipe is Recipe.AUTOCAST:
            return torch.autocast("cpu", torch.bfloat16)
        return nullcontext()
