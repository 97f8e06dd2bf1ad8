"""What is known of a failed allocation: plain data that the tracer makes, and that files and exporters show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from memtrace.record.breakdown import (
    AllocatorReading,
    BatchShape,
    Breakdown,
    DeviceReading,
    EntryKey,
    totals_by_category,
)
from memtrace.record.categories import Category, Phase


class Witness(StrEnum):
    """Who told memtrace that an allocation had failed."""

    ALLOCATOR = "allocator"
    """The device's caching allocator, at the moment of the failure and before anything was freed."""
    EXCEPTION = "exception"
    """An exception on its way out of the training step: what its frames hold is still there."""
    RESTART = "restart"
    """Trainer, which began again with a smaller batch: what the failed step held is gone."""


class RemedyKind(StrEnum):
    """A way to need less memory."""

    CHECKPOINTING = "checkpointing"
    SMALLER_MICRO_BATCH = "smaller_micro_batch"
    BF16 = "bf16"
    EIGHT_BIT_OPTIMIZER = "8bit_optimizer"
    SHARDING = "sharding"
    NO_FOREACH = "no_foreach"
    EXPANDABLE_SEGMENTS = "expandable_segments"
    OTHER_PROCESSES = "other_processes"
    UNATTRIBUTED = "unattributed"
    EVAL_ACCUMULATION = "eval_accumulation"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedRequest:
    """The allocation that failed."""

    witness: Witness
    phase: Phase
    requested_bytes: int | None = None
    """What was asked for, as the exception says it. CUDA's allocator words the segment of a request above 10 MiB, which
    is up to 2 MiB larger, to two decimals. None where nobody tells: for a smaller request of it."""
    segment_bytes: int | None = None
    """What the caching allocator wanted of the device to serve the request: the size of a segment, an upper bound of
    the request (20 MiB for one of 3). None where the allocator did not tell."""
    free_bytes: int | None = None
    """What the device had free when it failed; None where that was not read at that moment."""
    module: str | None = None
    """Name of the innermost module of the model whose forward pass asked; None outside of one."""
    message: str = ""
    """First line of the exception, cut to some hundred characters; empty where there is none."""
    pending: bool = False
    """Whether no exception had followed when the report was made: torch catches such a failure where it can go on
    with less, as in a search for a convolution's workspace."""

    evaluation: bool = False
    """Whether it failed between steps with the model in evaluation mode: in an evaluation or a prediction."""

    @property
    def bound_bytes(self) -> int | None:
        """What was asked for, or else the upper bound of it; None where neither is known."""
        return self.segment_bytes if self.requested_bytes is None else self.requested_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """What memory was for when the allocation failed."""

    entries: Mapping[EntryKey, int]
    """Bytes of each entry that has any, in the order of `Category`."""
    allocated_bytes: int | None
    """What the allocator says was allocated, as requested; None where it has no counter."""
    complete: bool
    """False where only what lives longer than a step could be seen: on a CPU, in a step that was not traced."""
    estimated: bool
    """True where activations were told from other unclaimed blocks by the counters, not by tags."""

    @property
    def total_bytes(self) -> int:
        """Sum of all entries."""
        return sum(self.entries.values())

    def by_category(self) -> dict[Category, int]:
        """Bytes of each category that has any, the largest first."""
        return dict(sorted(totals_by_category(self.entries).items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A module, or all modules whose names differ in numbers only, with what is kept for its parameters and buffers."""

    name: str
    """Such as `model.layers.*.mlp.up_proj`, where a star stands for the numbers; empty for the model itself."""
    modules: int
    """How many modules share the name."""
    categories: Mapping[Category, int]
    """Bytes by category, the largest first."""

    @property
    def total_bytes(self) -> int:
        """Sum of all categories."""
        return sum(self.categories.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeBlock:
    """One of the largest blocks that were in use."""

    nbytes: int
    key: EntryKey
    module: str | None
    """The module it is kept for; None where it belongs to no parameter or buffer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinnedSegment:
    """A segment with free memory that cannot be given back, since blocks of it are in use. Bytes."""

    size: int
    free_bytes: int
    pinned_by: int
    """How many blocks of it are in use."""
    pins: tuple[tuple[int, EntryKey], ...]
    """The smallest of them, with what each is for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragmentation:
    """How the memory that the caching allocator holds without using it is cut up. Bytes."""

    free_bytes: int
    """Free pieces in all segments together."""
    largest_free_bytes: int
    """The largest one of them: no request above it can be served from the cache."""
    segments: int
    """Stretches of device memory that the allocator holds."""
    expandable: bool
    """Whether segments can grow (`expandable_segments:True`)."""
    pinned: tuple[PinnedSegment, ...] = ()
    """The segments with most free memory beside blocks in use. Of segments that grow none: they give pages back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedy:
    """Something that would have left more memory free, and how much by what was allocated at that moment."""

    kind: RemedyKind
    saved_bytes: int
    would_fit: bool | None
    """Whether the failed request would then have been served; None where its size or free memory is not known."""
    advice: str
    """What to do, in one or two sentences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingOutcome:
    """What the allocator would have reserved under one setting, by its model. Bytes."""

    settings: str
    """As PYTORCH_ALLOC_CONF takes them; empty for torch's defaults."""
    in_force: bool
    """Whether the run has this setting."""
    reserved_bytes: int
    """At the peak of the recorded step."""
    saved_bytes: int
    """Less than under the setting in force; below 0 where it is more."""
    retries: int
    """How often everything cached had to be given back."""
    would_fit: bool | None
    """Whether what it saves is enough for the failed request; None where its size or free memory is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorAnswer:
    """What other allocator settings would have reserved in a recorded step."""

    origin: str
    """Which step was recorded."""
    variable: str
    """The variable that this version of torch reads."""
    outcomes: tuple[SettingOutcome, ...]
    """The one to take first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OomReport:
    """Everything memtrace knows about the moment at which an allocation failed."""

    run_name: str
    rank: int
    world_size: int
    device: str
    unix_seconds: float
    step: int | None
    """Number of the step in progress; None between steps."""
    batch: BatchShape | None
    request: FailedRequest
    composition: Composition
    holders: tuple[Holder, ...]
    """The largest first."""
    large_blocks: tuple[LargeBlock, ...]
    """The largest first."""
    allocator: AllocatorReading | None
    fragmentation: Fragmentation | None
    device_memory: DeviceReading | None
    """The newest reading, which may be a second old."""
    limit_bytes: int | None
    """`device_limit_bytes` of the settings."""
    last_traced_step: int | None
    last_traced_peak: Breakdown | None
    remedies: tuple[Remedy, ...]
    """Those that save most first."""
    run_id: str = ""
    """The launch that the run belongs to; empty in reports of older versions."""
    allocator_answer: AllocatorAnswer | None = None
    """None without a recording: on a CPU, and before a step was traced."""
