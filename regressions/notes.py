"""What the largest jumps are: read in the sources of the releases."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """What a jump is."""

    title: str
    jumps: tuple[tuple[str, str], ...]
    """The releases that made it, each with a pattern of the cases' names; none for a note of no jump."""
    text: str

    @property
    def anchor(self) -> str:
        """The heading's place on the page."""
        return re.sub(r"[^\w -]", "", self.title.lower()).replace(" ", "-")


NOTES = (
    Note(
        title="T5 takes a fused kernel",
        jumps=(("5.20.0", "t5-*"),),
        text=(
            "5.15.0 gave T5's attention to `scaled_dot_product_attention`, with the relative positions as its "
            "mask. They were a permuted view whose rows are not dense: memory-efficient attention does not take "
            "that, and flash attention takes no mask. What ran was plain products, whose softmax is kept in "
            "float32, as before 5.15.0. 5.20.0 makes the mask contiguous (`create_position_bias_mask` in "
            "`integrations/sdpa_attention.py`): the fused kernel takes it, and the scores of all layers are gone."
        ),
    ),
    Note(
        title="T5 goes through scaled_dot_product_attention",
        jumps=(("5.15.0", "t5-*"),),
        text=(
            "5.15.0 (`models/t5/modeling_t5.py`): see above. Under autocast each layer takes the positions to its "
            "own type, so that they are kept once for each layer."
        ),
    ),
    Note(
        title="T5 makes no mask where nothing is padded",
        jumps=(("5.0.0", "t5-bf16"),),
        text=(
            "Until 4.57 `T5Stack` made a mask of ones where it was given none, and its sum with the relative "
            "positions was as large as the batch, in each layer that a checkpoint keeps its inputs of. From 5.0 "
            "on there is no mask (`create_bidirectional_mask`), and the positions of one text serve all."
        ),
    ),
    Note(
        title="Attention copies no inputs",
        jumps=(*(("4.56.0", cases) for cases in ("vit-*", "gemma-autocast")),),
        text=(
            "Until 4.55 `sdpa_attention_forward` made query, key and value contiguous, whether the kernel needed "
            "it or not: a copy of each that was a transposed view, kept for the backward pass. 4.56.0 leaves them "
            "as they are. With rotary positions only the values were such views; ViT, which has none, had three."
        ),
    ),
    Note(
        title="A mask that nobody gave",
        jumps=(
            *((release, case) for release in ("4.53.0", "5.0.0") for case in ("mistral-bf16", "whisper-*")),
            *((release, "gpt2-bf16") for release in ("4.54.0", "5.0.0")),
        ),
        text=(
            "From 4.53 (GPT-2: 4.54) to 4.57 a training step without an attention mask got one all the same: the "
            "positions were searched for packed texts, and what was found, none, became a mask of all pairs "
            "(`find_packed_sequence_indices` in `masking_utils.py`). 5.0 makes no mask where there is one text in "
            "each row. With a mask attention is memory-efficient instead of flash. That takes a mask of its own "
            "type in each layer, but its output lies in the order that the next projection reads, where flash "
            "attention's is copied and both are kept: in Whisper's decoder 36.75 MiB of masks for 63 MiB of "
            "copies, in the layer of Mistral that is recomputed 16 MiB for 64. GPT-2's peak has the mask alone, "
            "which is made once. Keys and values of grouped heads are repeated in 4.53 in any case, in 5.0 only "
            "for a mask."
        ),
    ),
    Note(
        title="Mixtral before 5.0",
        jumps=(),
        text=(
            "Until 4.57 each expert looks with `nonzero` which tokens are its own, which only the values tell: "
            "there is no plan. From 5.0 on the weights of all experts of a layer are two tensors, and "
            "`grouped_mm` takes them in calls of a known size."
        ),
    ),
    Note(
        title="What did not change",
        jumps=(),
        text=(
            "The loss takes the logits to float32 in every release (`ForCausalLMLoss`): with their gradient they "
            "are the largest part of the peak where the vocabulary is large and the model small, or checkpointed. "
            "Masks of padded texts became booleans (4.53 for Llama and its kin, 4.54 for GPT-2, 5.0 for BERT), of "
            "which attention makes a mask of its own type in each layer; autocast had done the same with float32 "
            "masks before. 5.0 does not tie the weights of a model that is made on the meta device; a run has "
            "them tied, and so has the plan."
        ),
    ),
)
