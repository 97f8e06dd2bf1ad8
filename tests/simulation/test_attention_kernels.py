"""Which kernel of attention a simulated CUDA device takes, by what the backward pass is left with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import memtrace
from memtrace.record.categories import Category, Moment

SAMPLES, HEADS, ROWS, SIZE = 4, 4, 512, 64
SCORES = SAMPLES * HEADS * ROWS * ROWS
"""Elements of the scores of one layer."""


class Attention(nn.Module):
    """One layer of attention over its own parameters, with a learned bias on demand."""

    def __init__(
        self,
        *,
        bias: str = "none",
        size: int = SIZE,
        key_heads: int = HEADS,
        dropout: float = 0.0,
        is_causal: bool = False,
        key_rows: int = ROWS,
    ) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(SAMPLES, HEADS, ROWS, size))
        self.key = nn.Parameter(torch.zeros(SAMPLES, key_heads, key_rows, size))
        self.value = nn.Parameter(torch.zeros(SAMPLES, key_heads, key_rows, size))
        self.bias = nn.Parameter(torch.zeros(ROWS, key_rows, HEADS))
        self.kind, self.grouped, self.dropout, self.is_causal = bias, key_heads != HEADS, dropout, is_causal

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        mask = None
        if self.kind != "none":
            mask = self.bias.permute(2, 0, 1).unsqueeze(0)
            mask = mask.contiguous() if self.kind == "dense" else mask
        output = F.scaled_dot_product_attention(
            self.query, self.key, self.value, mask, self.dropout, self.is_causal, enable_gqa=self.grouped
        )
        return (output * scale).sum()


def saved(recipe: str = "fp32", **settings: object) -> int:
    """Returns the bytes that one layer holds for its backward pass."""
    plan = memtrace.plan(lambda: Attention(**settings), lambda: torch.ones(1), recipe=recipe, optimizer="sgd")
    return plan.moments[Moment.FORWARD_END][Category.ACTIVATIONS]


@pytest.mark.parametrize(
    "settings",
    [
        {"bias": "permuted"},
        {"size": 66},
        {"size": 260, "key_heads": 2, "recipe": "pure-bf16"},
        {"key_heads": 2},
        {"size": 66, "bias": "dense", "recipe": "pure-bf16"},
    ],
    ids=["a bias whose rows are not dense", "unaligned heads", "large grouped heads", "grouped heads in float32",
         "a mask and unaligned heads in bfloat16"],
)  # fmt: skip
def test_plain_products_keep_their_scores(settings: dict[str, object]) -> None:
    """No fused kernel takes these: the softmax of all scores is kept, in float32 whatever the weights are in."""
    assert saved(**settings) >= 4 * SCORES


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bias": "dense"},
        {"key_heads": 2, "recipe": "pure-bf16"},
        {"size": 66, "recipe": "pure-bf16"},
        {"is_causal": True, "key_rows": 2 * ROWS, "recipe": "pure-bf16"},
    ],
    ids=["float32", "a dense bias that is learned", "grouped heads", "padded heads", "causal and not square"],
)
def test_fused_kernels_do_not(settings: dict[str, object]) -> None:
    """Flash or memory-efficient attention keeps one number a row."""
    assert saved(**settings) < 2 * SCORES


def test_dropout_in_plain_products_keeps_a_mask_of_booleans() -> None:
    """As CUDA's kernel of dropout does: the weights after it in float32, and one byte for each of them."""
    without, with_dropout = saved(bias="permuted"), saved(bias="permuted", dropout=0.1)
    assert with_dropout - without == pytest.approx(5 * SCORES, rel=0.01)


def test_autocast_takes_the_mask_to_its_own_type_as_well() -> None:
    """Each call saves a copy of a float32 mask in bfloat16: `scaled_dot_product_attention` is in autocast's list."""
    with_bias, without = saved("hf-autocast", bias="dense"), saved("hf-autocast")
    assert with_bias - without == pytest.approx(2 * HEADS * ROWS * ROWS, rel=0.001)
