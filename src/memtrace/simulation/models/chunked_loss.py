"""A loss that never has the logits of all tokens at once, as chunked and fused cross-entropies do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrace.errors import PlanError

CHUNKS = 8
"""Parts that the tokens of a micro batch are cut into."""


class ChunkedLoss(nn.Module):
    """A language model whose logits are made chunk by chunk, and made again in the backward pass.

    Fused kernels (Liger, Unsloth) hold about as much: one chunk of logits, and the gradient of the hidden states.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        language_model = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside adapters
        self._body, self._head = language_model.base_model, language_model.get_output_embeddings()
        if self._body is language_model or self._head is None:
            raise PlanError(f"a chunked loss needs a language model with a head, got {type(model).__name__}")

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross-entropy of the next token."""
        hidden = self._body(input_ids=input_ids).last_hidden_state
        tokens = hidden[:, :-1].flatten(0, 1)
        chunks = zip(tokens.chunk(CHUNKS), labels[:, 1:].flatten().chunk(CHUNKS), strict=True)
        losses: list[torch.Tensor] = [checkpoint(self._loss, *chunk, use_reentrant=False) for chunk in chunks]
        total: torch.Tensor = torch.stack(losses).sum() / tokens.shape[0]
        return total

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._head(hidden).float()
        return F.cross_entropy(logits, labels, reduction="sum")
