"""Who holds which share of a model: one rank's view of DDP, DeepSpeed's ZeRO and FSDP.

Sizes of buckets are the engines' defaults, in elements or bytes as the engines count them. Read in DeepSpeed 0.19
(deepspeed/runtime/zero/config.py) and torch 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from memtrace.errors import PlanError

ZERO_REDUCE_BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce bucket (`reduce_bucket_size`), allocated whole however small the model is."""

ZERO3_MAX_LIVE = 1_000_000_000
"""Gathered elements that ZeRO-3 keeps before it releases some (`stage3_max_live_parameters`)."""

ZERO3_SUB_GROUP = 1_000_000_000
"""Elements that ZeRO-3 updates at a time (`sub_group_size`)."""


class Strategy(StrEnum):
    """How the ranks share the work and the memory."""

    NONE = "none"
    DDP = "ddp"
    ZERO0 = "zero0"
    ZERO1 = "zero1"
    ZERO2 = "zero2"
    ZERO3 = "zero3"
    FSDP = "fsdp"

    @property
    def label(self) -> str:
        """Its name for people, such as `ZeRO 2`."""
        return f"ZeRO {self.value[-1]}" if self in ZERO_STAGES else self.value.upper()


ZERO_STAGES: tuple[Strategy, ...] = (Strategy.ZERO0, Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3)
"""By stage number."""


class Offload(StrEnum):
    """What is kept in the memory of the host."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    """Master copies, optimizer states and gradient shards."""
    PARAMETERS = "parameters"
    """The above, and the shards of the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Zero3Settings:
    """How ZeRO-3 fetches weights, in elements, with the names and defaults of deepspeed/runtime/zero/config.py.

    A plan by formula takes the defaults.
    """

    prefetch_bucket: int = 50_000_000
    """Weights that are gathered ahead of their use (`stage3_prefetch_bucket_size`)."""
    max_live: int = ZERO3_MAX_LIVE
    """Gathered weights above which nothing is gathered ahead (`stage3_max_live_parameters`)."""
    max_reuse: int = 1_000_000_000
    """Weights are not released where they are used again within so many others (`stage3_max_reuse_distance`)."""
    persistence_threshold: int = 100_000
    """Parameters up to this size stay gathered (`stage3_param_persistence_threshold`)."""
    sub_group: int = ZERO3_SUB_GROUP
    """Elements of this rank's share that are updated at a time (`sub_group_size`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """A strategy, its world and its options."""

    strategy: Strategy = Strategy.NONE
    world_size: int = 1
    """Ranks that hold one copy of the model between them, or a copy each."""
    rank: int = 0
    """Whose memory is planned. A plan by formula takes the largest share."""
    offload: Offload = Offload.NONE
    overlap_comm: bool = False
    """Whether ZeRO-1 and 2 reduce one bucket while they fill a second."""
    torch_adam: bool = False
    """Whether DeepSpeed steps torch's Adam, which goes through lists, and not a fused one of its own (`torch_adam`)."""
    reduce_bucket: int = ZERO_REDUCE_BUCKET
    """Elements of DeepSpeed's reduce bucket. A plan by formula takes the default."""
    gradient_as_bucket_view: bool = False
    """Whether DDP's gradients are views of its buckets."""
    reshard_after_forward: bool = True
    """Whether FSDP2 frees gathered layers after their forward pass. A plan by formula does."""
    zero3: Zero3Settings = field(default_factory=Zero3Settings)

    def __post_init__(self) -> None:
        if not 1 <= self.world_size <= 10**6:
            raise PlanError(f"world size must be 1..1000000, got {self.world_size}")
        if not 0 <= self.rank < self.world_size:
            raise PlanError(f"rank must be 0..{self.world_size - 1} in a world of {self.world_size}, got {self.rank}")
        if self.strategy is Strategy.NONE and self.world_size > 1:
            raise PlanError(
                f"a world of {self.world_size} ranks needs to know how they share the model: DDP, FSDP or a ZeRO stage"
            )
        if self.offload is Offload.OPTIMIZER and self.strategy not in _OFFLOADS_OPTIMIZER:
            raise PlanError(f"offloading the optimizer needs ZeRO 1, 2 or 3, got {self.strategy}")
        if self.offload is Offload.PARAMETERS and self.strategy not in _SHARDS_WEIGHTS:
            raise PlanError(f"offloading parameters needs ZeRO 3 or FSDP, got {self.strategy}")

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs the step."""
        return self.strategy in ZERO_STAGES

    @property
    def brings_fused_step(self) -> bool:
        """Whether the engine steps an optimizer of its own, in one kernel without temporaries."""
        return self.is_zero and not self.torch_adam

    @property
    def offloads_weights(self) -> bool:
        """Whether the shards of the weights are kept in the memory of the host."""
        return self.offload is Offload.PARAMETERS

    @property
    def copies_gradients(self) -> bool:
        """Whether the step makes float32 copies of 16-bit gradients on the device (DeepSpeed's ZeRO optimizers)."""
        return self.strategy in _OFFLOADS_OPTIMIZER and self.offload is Offload.NONE

    @property
    def shards_states(self) -> bool:
        """Whether each rank keeps the optimizer's states and masters for its share only."""
        return self.strategy in _OFFLOADS_OPTIMIZER or self.strategy is Strategy.FSDP

    @property
    def shards_gradients(self) -> bool:
        """Whether each rank keeps reduced gradients for its share only."""
        return self.strategy in (Strategy.ZERO2, Strategy.ZERO3, Strategy.FSDP)

    @property
    def shards_weights(self) -> bool:
        """Whether each rank keeps weights for its share only, and gathers the others when they are used."""
        return self.strategy in _SHARDS_WEIGHTS

    def share(self, elements: int) -> int:
        """Returns the elements of the largest share."""
        return -(-elements // self.world_size)


_OFFLOADS_OPTIMIZER = frozenset({Strategy.ZERO1, Strategy.ZERO2, Strategy.ZERO3})
_SHARDS_WEIGHTS = frozenset({Strategy.ZERO3, Strategy.FSDP})
