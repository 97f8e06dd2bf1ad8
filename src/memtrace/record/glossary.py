"""The terms of the field, as memtrace uses them everywhere: what each means, and which words it takes the place of.

Help texts of metrics and titles of panels take their wording from here, and `docs/glossary.md` is made of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """One term."""

    name: str
    """As it stands inside a sentence."""
    meaning: str
    """One sentence or two."""
    instead_of: tuple[str, ...] = ()
    """Words that memtrace does not use for it."""

    @property
    def title(self) -> str:
        """The name as a heading."""
        return self.name[:1].upper() + self.name[1:]


ALLOCATED = Term(
    "allocated memory",
    "Blocks in use at the end of the last step, rounded as the allocator rounds them.",
)
RESERVED = Term(
    "reserved memory",
    "What the allocator held of the device at the end of the last step, in use or cached.",
)
SLACK = Term(
    "allocator slack",
    "Reserved minus allocated and private pools: what torch can use again without asking the device.",
)
PRIVATE_POOL = Term(
    "private pool",
    "What private pools (CUDA graphs, MemPool) hold beyond the blocks in use in them: neither slack nor headroom.",
)
NON_TORCH = Term(
    "non-torch memory",
    "What this process holds on the device beyond what the allocator reserved: context, NCCL, libraries.",
)
DEVICE_LIMIT = Term(
    "device limit",
    "What the run may use of the device: device_limit_bytes of its settings, else all that the device has.",
)
HEADROOM = Term(
    "headroom",
    "What the run can still allocate: free memory of the device plus allocator slack, within "
    "memtrace_device_limit_bytes and what set_per_process_memory_fraction allows; below 0 when the run is over one.",
)
CAPACITY = Term(
    "capacity",
    "What the tensors of the run may take in all: what they took at the end of the last step, plus the headroom.",
)
PEAK = Term(
    "step peak",
    "Most memory allocated at once within a step: the newest step whose peak is known or estimated.",
)
HEADROOM_AT_THE_PEAK = Term(
    "headroom at the peak",
    "Share of the capacity that the peak of a step leaves. Memory that torch has cached is part of the headroom.",
    instead_of=("left at the peak", "left at its peak", "of its memory left"),
)
FORECAST_PEAK = Term(
    "forecast peak",
    "What the largest micro batch that the run can still meet is expected to take at its peak.",
    instead_of=("foreseen", "foresees", "foresee"),
)
RISK = Term(
    "out-of-memory risk",
    "Probability, 0 to 1, that the largest micro batch to come, or a leak within the hour, exceeds the capacity.",
)
GROWTH = Term(
    "growth",
    "How much persistent memory grows with each step, with the category that grows most.",
)
TIME_TO_OOM = Term(
    "time to out-of-memory",
    "Time until growth has brought the forecast peak to the capacity, at the pace of the last steps.",
    instead_of=("time left",),
)
PERSISTENT = Term(
    "persistent memory",
    "What outlives a step: weights, master weights, optimizer state, buffers, communication buffers, workspaces, and "
    "whatever nobody claims.",
    instead_of=("outlives steps", "outlives every step", "outlives the steps", "what outlives a step"),
)
MICRO_BATCH = Term(
    "micro batch",
    "The samples of one forward pass; with gradient accumulation a step has several. Its tokens are samples x "
    "positions.",
)
TRACED_STEP = Term(
    "traced step",
    "A step whose breakdown was made from allocator events, and is exact.",
)
COUNTED_STEP = Term(
    "counted step",
    "A step whose breakdown comes from the allocator's counters and from earlier traces, and is an estimate.",
)
SKIPPED_STEP = Term(
    "skipped step",
    "A step that is counted as a number and has no record, where steps are too short for one within the overhead "
    "budget.",
    instead_of=("passed over", "passes over", "pass over"),
)
STEP_IN_PROGRESS = Term(
    "step in progress",
    "The step between its first forward pass and the end of its optimizer's update.",
    instead_of=("step in flight", "in flight"),
)
OVERHEAD = Term(
    "overhead",
    "Share of the wall time since memtrace was attached that it has cost, its own time and slower steps together.",
)
MOMENT = Term(
    "moment",
    "When memory was looked at: the end of the forward pass, of the backward pass, of the step, or the peak.",
)
UNATTRIBUTED = Term(
    "unattributed memory",
    "Blocks that outlive the step and that nobody claims: a leak shows here first.",
)
NOTIFIED = Term(
    "notified",
    "Called with what has happened, as a listener is.",
    instead_of=("is told of", "are told of", "been told of"),
)

TERMS: tuple[Term, ...] = (
    ALLOCATED,
    RESERVED,
    SLACK,
    PRIVATE_POOL,
    NON_TORCH,
    DEVICE_LIMIT,
    HEADROOM,
    CAPACITY,
    PEAK,
    HEADROOM_AT_THE_PEAK,
    FORECAST_PEAK,
    RISK,
    GROWTH,
    TIME_TO_OOM,
    PERSISTENT,
    MICRO_BATCH,
    TRACED_STEP,
    COUNTED_STEP,
    SKIPPED_STEP,
    STEP_IN_PROGRESS,
    OVERHEAD,
    MOMENT,
    UNATTRIBUTED,
    NOTIFIED,
)
"""From the allocator to the run."""
