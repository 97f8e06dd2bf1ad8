"""The optimizers that Trainer knows by name (`optim=`) and torch does not have, and those that cannot be planned.

Source: transformers 5.23, trainer_optimizer.py, and the optimizers' own packages where a row names one. The rows of
schedulefree are held against the real optimizers by a test; the others are read, most of their packages install nowhere
that this is tested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType

from memtrace.planning.optimizers.layouts import (
    BLOCK_SIZE_8BIT,
    FACTOR,
    MATRIX_SIDE,
    RANK,
    OptimizerLayout,
    State,
    blockwise,
    dense,
)

_SHARE = Fraction(RANK, MATRIX_SIDE)
_BLOCK_4BIT = 256
"""Elements that share a scale: Trainer gives torchao `block_size=256`."""

_LOW_RANK_NOTE = (
    f"Low-rank states are counted for square matrices of {MATRIX_SIDE} x {MATRIX_SIDE} and rank {RANK}; a "
    "simulated plan projects every matrix that is trained, embeddings too."
)
_STEP_NOTE = "Temporaries of this optimizer's step are not counted."
_PAGED_NOTE = (
    "Paged states lie in managed memory outside of torch's allocator: they are counted for the host, and take what "
    "room there is on the device while they are used. Scales of 8-bit states stay on the device, and so do states of "
    "parameters with fewer than 100,000 elements, which only a simulated plan knows."
)


def _low_rank(*components: str, dtype: str | None = None) -> tuple[State, ...]:
    return tuple(State(component=name, dtype=dtype, elements=_SHARE, low_rank=True) for name in components)


_PROJECTION = State(component="projector", elements=_SHARE, low_rank=True)


def _paged(layout: OptimizerLayout, name: str) -> OptimizerLayout:
    return replace(layout, name=name, paged=True, note=_PAGED_NOTE)


def _of_bitsandbytes(name: str, source: str, states: tuple[State, ...]) -> OptimizerLayout:
    return OptimizerLayout(name=name, source=f"bitsandbytes.optim.{source}", states=states)


_ADAMW_8BIT = _of_bitsandbytes("adamw_bnb_8bit", "AdamW", blockwise("1", "2"))
_ADAMW_32BIT = _of_bitsandbytes("adamw_bnb_32bit", "AdamW", dense("state1", "state2", dtype="float32"))
_LION = _of_bitsandbytes("lion_32bit", "Lion", dense("state1", dtype="float32"))
_LION_8BIT = _of_bitsandbytes("lion_8bit", "Lion", blockwise("1"))
_ADEMAMIX = _of_bitsandbytes(
    "ademamix",
    "AdEMAMix",
    (State(component="state1", dtype="float32", elements=Fraction(2)), State(component="state2", dtype="float32")),
)
_ADEMAMIX_8BIT = _of_bitsandbytes("ademamix_8bit", "AdEMAMix", blockwise("1", "2", copies=2))

TRAINER_LAYOUTS: tuple[OptimizerLayout, ...] = (
    _LION,
    _LION_8BIT,
    _ADEMAMIX,
    _ADEMAMIX_8BIT,
    _of_bitsandbytes("rmsprop_bnb", "RMSprop", dense("state1", dtype="float32")),
    _of_bitsandbytes("rmsprop_bnb_8bit", "RMSprop", blockwise("1")),
    _paged(_ADAMW_32BIT, "paged_adamw_32bit"),
    _paged(_ADAMW_8BIT, "paged_adamw_8bit"),
    _paged(_LION, "paged_lion_32bit"),
    _paged(_LION_8BIT, "paged_lion_8bit"),
    _paged(_ADEMAMIX, "paged_ademamix_32bit"),
    _paged(_ADEMAMIX_8BIT, "paged_ademamix_8bit"),
    OptimizerLayout(
        name="adamw_torch_8bit",
        source="torchao.optim.AdamW8bit",
        states=(
            *dense("exp_avg", "exp_avg_sq", dtype="uint8"),
            State(component="scale", dtype="float32", elements=Fraction(2, BLOCK_SIZE_8BIT)),
        ),
        note=_STEP_NOTE,
    ),
    OptimizerLayout(
        name="adamw_torch_4bit",
        source="torchao.optim.AdamW4bit",
        states=(
            State(component="exp_avg", dtype="uint8", elements=Fraction(1, 2)),
            State(component="exp_avg_sq", dtype="uint8", elements=Fraction(1, 2)),
            State(component="scale", dtype="float32", elements=Fraction(2, _BLOCK_4BIT)),
        ),
        note=_STEP_NOTE,
    ),
    OptimizerLayout(
        name="adamw_anyprecision",
        source="torchdistx.optimizers.AnyPrecisionAdamW",
        states=dense("exp_avg", "exp_avg_sq", dtype="float32"),
        note=_STEP_NOTE,
    ),
    OptimizerLayout(
        name="galore_adamw",
        source="galore_torch.GaLoreAdamW",
        states=(*_low_rank("exp_avg", "exp_avg_sq"), _PROJECTION),
        note=_LOW_RANK_NOTE,
    ),
    OptimizerLayout(
        name="galore_adamw_8bit",
        source="galore_torch.GaLoreAdamW8bit",
        states=(*_low_rank("state1", "state2", dtype="uint8"), _PROJECTION),
        note=_LOW_RANK_NOTE,
    ),
    OptimizerLayout(
        name="galore_adafactor",
        source="galore_torch.GaLoreAdafactor",
        states=(
            State(component="exp_avg_sq_row", elements=FACTOR, dtype="float32"),
            State(component="exp_avg_sq_col", elements=FACTOR, dtype="float32"),
            _PROJECTION,
        ),
        note=_LOW_RANK_NOTE,
    ),
    OptimizerLayout(
        name="apollo_adamw",
        source="apollo_torch.APOLLOAdamW",
        states=(*_low_rank("exp_avg", "exp_avg_sq"), _PROJECTION),
        note=_LOW_RANK_NOTE,
    ),
    OptimizerLayout(
        name="grokadamw",
        source="grokadamw.GrokAdamW",
        states=dense("exp_avg", "exp_avg_sq", "grok_ema"),
        note=_STEP_NOTE,
    ),
    OptimizerLayout(
        name="schedule_free_adamw",
        source="schedulefree.AdamWScheduleFree",
        states=dense("z", "exp_avg_sq"),
        note=_STEP_NOTE,
    ),
    OptimizerLayout(
        name="schedule_free_radam",
        source="schedulefree.RAdamScheduleFree",
        states=dense("z", "exp_avg_sq"),
        note=_STEP_NOTE,
    ),
    OptimizerLayout(
        name="schedule_free_sgd", source="schedulefree.SGDScheduleFree", states=dense("z"), note=_STEP_NOTE
    ),
    OptimizerLayout(
        name="stable_adamw",
        source="optimi.StableAdamW",
        states=dense("exp_avg", "exp_avg_sq"),
        note=f"{_STEP_NOTE} With 16-bit weights it keeps kahan_comp besides, as large as the weights.",
    ),
)
"""What each keeps. Their kernels update in place; other temporaries are not counted."""

OTHER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_bnb_8bit": "adamw8bit",
        "adamw_8bit": "adamw8bit",
        "rmsprop_bnb_32bit": "rmsprop_bnb",
    }
)
"""Names of Trainer for optimizers that have another one here. What Trainer calls `adafactor` is `adafactor-hf`."""

_IN_BACKWARD = (
    "it updates each weight inside the backward pass and frees its gradient there; plan {} for an upper bound"
)
_ELSEWHERE = "it runs on {} alone; plan adamw"

NOT_PLANNED: Mapping[str, str] = MappingProxyType(
    {
        "galore_adamw_layerwise": _IN_BACKWARD.format("galore_adamw"),
        "galore_adamw_8bit_layerwise": _IN_BACKWARD.format("galore_adamw_8bit"),
        "galore_adafactor_layerwise": _IN_BACKWARD.format("galore_adafactor"),
        "apollo_adamw_layerwise": _IN_BACKWARD.format("apollo_adamw"),
        "lomo": _IN_BACKWARD.format("sgd"),
        "adalomo": _IN_BACKWARD.format("adafactor-hf"),
        "adamw_torch_xla": _ELSEWHERE.format("XLA devices"),
        "adamw_torch_npu_fused": _ELSEWHERE.format("NPUs"),
    }
)
"""Names of Trainer that are refused, and what to plan instead."""
