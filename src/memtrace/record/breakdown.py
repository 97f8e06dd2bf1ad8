"""What memory was for, at one moment, and the record of one step. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from memtrace.record.categories import Category, Moment


class EntryKey(NamedTuple):
    """What the bytes of one entry have in common."""

    category: Category
    component: str
    """A part of the category, such as `exp_avg` or `frozen`; empty where a category has one part only."""
    dtype: str
    """Element type as torch prints it without `torch.`, such as `bfloat16`; empty where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Bytes by (category, component, dtype) at one moment on one device."""

    moment: Moment
    entries: Mapping[EntryKey, int]
    """Bytes of each entry that has any, in the order of `Category`."""
    allocated_bytes: int | None = None
    """What the allocator says was allocated at that moment, counted independently of the entries.

    None where no allocator was asked: a counted step on a CPU. At the peak of a counted step it is the allocator's
    high-water mark where that rose within the step, and None where it did not: then the peak itself is an estimate.
    """
    estimated: bool = False
    """True where the entries follow from counters and earlier traces instead of events."""

    def __reduce__(self) -> tuple[object, ...]:  # a read-only view of a dict can be neither pickled nor copied
        return _breakdown, (self.moment, dict(self.entries), self.allocated_bytes, self.estimated)

    def __getitem__(self, category: Category) -> int:
        """Bytes of one category; 0 where it has none."""
        return sum(size for key, size in self.entries.items() if key.category is category)

    @property
    def total_bytes(self) -> int:
        """Sum of all entries."""
        return sum(self.entries.values())

    @property
    def held_bytes(self) -> int:
        """What was allocated, by the allocator's own count where there is one, else by the entries."""
        return self.total_bytes if self.allocated_bytes is None else self.allocated_bytes

    def by_category(self) -> dict[Category, int]:
        """Bytes of each category that has any, in the order of `Category`."""
        return totals_by_category(self.entries)


def _breakdown(
    moment: Moment, entries: dict[EntryKey, int], allocated_bytes: int | None, estimated: bool, /
) -> Breakdown:
    return Breakdown(
        moment=moment, entries=MappingProxyType(entries), allocated_bytes=allocated_bytes, estimated=estimated
    )


_ORDER = {category: position for position, category in enumerate(Category)}
"""To go through it takes no call of Python, which to go through an enumeration does for each member."""


class OfCategory(Protocol):
    """What an entry is found by; it has a category."""

    @property
    def category(self) -> Category:
        """Which one."""


Key = TypeVar("Key", bound=OfCategory)


def totals_by_category(entries: Mapping[Key, int]) -> dict[Category, int]:
    """Returns the bytes of each category that has any entry, in the order of `Category`."""
    totals: dict[Category, int] = {}
    for key, size in entries.items():
        totals[key.category] = totals.get(key.category, 0) + size
    return {category: totals[category] for category in _ORDER if category in totals}


def ordered_entries(entries: Mapping[EntryKey, int]) -> Mapping[EntryKey, int]:
    """Returns the entries that are not 0, in the order of `Category`, then component, then dtype; read-only."""
    keys = sorted(
        (key for key, size in entries.items() if size),
        key=lambda key: (_ORDER[key.category], key.component, key.dtype),
    )
    return MappingProxyType({key: entries[key] for key in keys})


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorReading:
    """What the caching allocator of one device says about itself. Bytes; None where it does not say."""

    allocated_bytes: int
    """Blocks in use, each rounded up as the allocator rounds."""
    reserved_bytes: int
    """What the allocator holds of the device, in use or cached."""
    requested_bytes: int | None = None
    """Blocks in use as they were asked for, without rounding: what the categories add up to."""
    peak_allocated_bytes: int | None = None
    """The allocator's own high-water mark since somebody last reset it; memtrace never does."""
    peak_requested_bytes: int | None = None
    """The same mark of `requested_bytes`."""
    inactive_split_bytes: int | None = None
    """Cached pieces of partly used segments: what fragmentation can keep from being given back."""
    retries: int | None = None
    """How often the cache had to be flushed and the allocation tried again, since the process began."""
    ooms: int | None = None
    """How often an allocation failed, since the process began."""
    private_pool_bytes: int | None = None
    """What private pools (CUDA graphs, `MemPool`) hold beyond the blocks in use in them: nobody else can have it."""
    allowed_bytes: int | None = None
    """What it may reserve in all, as `set_per_process_memory_fraction` says; None where it is not bounded."""
    allocations: int | None = None
    """Allocations since the process began."""
    device_allocations: int | None = None
    """How often memory was got from the device, since the process began: tells that `reserved_bytes` has moved."""

    @property
    def slack_bytes(self) -> int:
        """What torch can reuse without asking the device: neither in use nor in a private pool."""
        return max(0, self.reserved_bytes - self.allocated_bytes - (self.private_pool_bytes or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReading:
    """What the driver (or, on a CPU, the operating system) says about one device. None where it does not say."""

    name: str | None = None
    uuid: str | None = None
    """The full `GPU-...` or `MIG-...` form; None on a CPU."""
    total_bytes: int | None = None
    """All memory of the device; on a CPU that of the machine, or the cgroup's limit where that is lower."""
    used_bytes: int | None = None
    """Neither free nor `driver_reserved_bytes`, whoever holds it."""
    free_bytes: int | None = None
    driver_reserved_bytes: int | None = None
    """What the driver keeps for itself, beside used and free. None where it is not told apart from used."""
    process_bytes: int | None = None
    """What this process holds on the device; on a CPU its resident set size."""
    other_processes_bytes: int | None = None
    """What all other processes hold. None as soon as one of them is not known."""
    non_torch_bytes: int | None = None
    """What this process holds beyond what torch's allocator had reserved at that moment: context, NCCL, libraries.

    With `free_and_reserved_bytes` of the newest reading for which that is known, which may be older than the rest: see
    `DeviceSampler`. None on a CPU.
    """
    free_and_reserved_bytes: int | None = None
    """Free memory plus what torch's allocator had reserved then: what torch can hold in all. None on a CPU."""
    utilization_ratio: float | None = None
    """Share of time in which a kernel ran, 0..1, over the driver's own window."""
    power_watts: float | None = None
    temperature_celsius: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """The batch of a step, as the model saw it."""

    shape: tuple[int, ...]
    """Shape of the largest integer tensor of the batch (or of the largest tensor where none is), one micro batch."""
    tokens: int
    """Elements of that shape's first two dimensions (samples x positions), summed over the micro batches.

    For a batch with one dimension the number of samples.
    """
    largest_micro_batch_tokens: int
    """The same for the largest micro batch alone: what the activations follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCurve:
    """How memory moved within one traced step."""

    seconds: Sequence[float]
    """When each point was, since the begin of the step; ascending. Between two points lie equally many allocations and
    frees, and each is where most was allocated among them: a curve is an upper bound between its points."""
    by_category: Mapping[Category, Sequence[int]]
    """Bytes at each point, of each category that has any, in the order of `Category`."""
    moments: Mapping[Moment, float]
    """When each moment of the step was, since its begin. Each of them is a point."""


@singledispatch
def drawing(data: object) -> Mapping[str, str]:
    """Returns what a notebook may show of some data, by media type; nothing where no exporter knows its kind.

    `exporters.drawn.notebook` registers what it draws: the data itself knows no exporter.
    """
    return {}


class Drawn:
    """What draws itself in a notebook, once a tracer was made; before that it is shown as Python prints it."""

    __slots__ = ()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Mapping[str, str]:
        return drawing(self)

    def _repr_html_(self) -> str | None:
        return drawing(self).get("text/html")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord(Drawn):
    """One training step: what memory was for, what was read, what measuring cost. A notebook draws it."""

    step: int
    """Number of the optimizer step, from 1."""
    rank: int
    device: str
    """As torch names it, such as `cuda:0` or `cpu`."""
    traced: bool
    """True where the breakdowns come from allocator events; False where they come from counters and the ledger."""
    unix_seconds: float
    """When the step ended, seconds since 1970."""
    self_seconds: float
    """Time that memtrace itself took on the training thread since the record before."""
    slowed_seconds: float = 0.0
    """What a traced step took longer than the counted ones before it, besides `self_seconds`: their median is what it
    is held against. 0 for a counted step."""
    step_seconds: float | None = None
    """Wall time from the beginning of the step to its end."""
    batch: BatchShape | None = None
    traced_from_micro_batch: int | None = None
    """Number of the micro batch that the trace begins with, from 1, where the allocator's history had no room for the
    whole step; then the peak is that of the part from there on. None where the whole step was traced, or none of it."""
    moments: Mapping[Moment, Breakdown] = field(default_factory=dict)
    host: Mapping[EntryKey, int] = field(default_factory=dict)
    """What the model, its optimizers and engines keep in the host's memory, where the device is another one.

    Offloaded weights, masters, optimizer state and gradients, as of the last traced step or the last new state. None of
    it is in `moments`. Empty on a CPU, where device and host are one.
    """
    allocator: AllocatorReading | None = None
    device_memory: DeviceReading | None = None
    peak_counter_reset: bool = False
    """True where somebody has reset the allocator's high-water mark since the step before. memtrace never does."""
    run_id: str = ""
    """The launch that the step belongs to; empty in logs of older versions."""
    curve: StepCurve | None = None
    """On a traced step with a peak above that of every one before, or where the settings want all: all of it. Not part
    of the step log."""

    replaced_bytes: int = 0
    """On a CPU, bytes that earlier traced steps have left behind and that are gone since the record before."""

    @property
    def non_torch_bytes(self) -> int | None:
        """What this process holds on the device beyond what the allocator reserved; None where that is not known."""
        return None if self.device_memory is None else self.device_memory.non_torch_bytes


class History(Drawn, tuple[StepRecord, ...]):
    """Records of steps, oldest first: a tuple that draws itself in a notebook."""

    __slots__ = ()
