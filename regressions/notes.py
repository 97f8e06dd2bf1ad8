"""What the largest jumps are: read in the sources of the releases."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a jump is."""

    release: str
    """The first row of the table that has it; empty for a note that is of no jump."""
    cases: str
    """Pattern of the cases' names."""
    title: str
    text: str

    @property
    def anchor(self) -> str:
        """The heading's place on the page."""
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")


NOTES = (
    Note(
        release="5.20.2",
        cases="t5-*",
        title="T5 takes a fused kernel",
        text=(
            "5.15.0 gave T5's attention to `scaled_dot_product_attention`, with the relative positions as its "
            "mask. They were a permuted view whose rows are not dense: memory-efficient attention does not take "
            "that, and flash attention takes no mask. What ran was plain products, whose softmax is kept in "
            "float32, as before 5.15.0. 5.20.0 makes the mask contiguous (`create_position_bias_mask` in "
            "`integrations/sdpa_attention.py`): the fused kernel takes it, and the scores of all layers are gone."
        ),
    ),
    Note(
        release="5.16.1",
        cases="t5-*",
        title="T5 goes through scaled_dot_product_attention",
        text=(
            "5.15.0 (`models/t5/modeling_t5.py`): see above. Autocast hands each layer a mask of its own type, so "
            "that the positions are kept once for each layer, not once for all."
        ),
    ),
    Note(
        release="4.56.2",
        cases="*",
        title="Attention copies no inputs",
        text=(
            "Until 4.55 `sdpa_attention_forward` made query, key and value contiguous, whether the kernel needed "
            "it or not: a copy of each that was a transposed view, kept for the backward pass. 4.56.0 leaves them "
            "as they are. Models with rotary positions had no views but the values; ViT, which has none, had "
            "three."
        ),
    ),
    Note(
        release="",
        cases="mixtral-*",
        title="Mixtral before 5.0",
        text=(
            "Until 4.57 each expert looks with `nonzero` which tokens are its own, which only the values tell: no "
            "plan. From 5.0 on the experts of a layer are one tensor each for the two products, and `grouped_mm` "
            "takes all of them in one call of a known size."
        ),
    ),
    Note(
        release="",
        cases="*",
        title="What did not change",
        text=(
            "Logits are taken to float32 by the loss in every release (`ForCausalLMLoss`): with the gradient they "
            "are the largest part of every small model's peak with a large vocabulary, and of each one with "
            "checkpointing. Masks of padded texts became booleans (4.53 for Llama and its kin, 4.54 for GPT-2, "
            "5.0 for BERT); attention makes a mask of its own type of them in each layer, as autocast did of the "
            "float32 mask before: the same bytes. 5.0 and 5.1 do not tie weights of a model that is made on the "
            "meta device. That is no memory of a run, and memtrace ties them itself."
        ),
    ),
)

BISECTED = ("",)
"""What `memtrace bisect` printed for one of the jumps."""
