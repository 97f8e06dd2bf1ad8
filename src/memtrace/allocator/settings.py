"""The settings of CUDA's caching allocator, and their text: what PYTORCH_ALLOC_CONF takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from memtrace.allocator.blocks import LARGE_SEGMENT
from memtrace.errors import ConfigError, PlanError
from memtrace.record.units import MIB

INTERVALS = 16
"""Powers of two from 1 MiB to 64 GiB for which roundup_power2_divisions can differ."""

_ITEM = re.compile(r"\s*(\w+)\s*:\s*(\[[^\]]*\]|[^,\[\]]*)\s*(?:,|$)")
_DIVISION = re.compile(r"\s*(\d+|>)\s*:\s*(\d+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """What PYTORCH_ALLOC_CONF can change; the defaults are torch's.

    Raises:
        PlanError: torch would not take a value.
    """

    expandable_segments: bool = False
    """Whether each pool is one segment that grows."""
    max_split_size: int | None = None
    """Bytes from which a block is not split; None for no limit (max_split_size_mb)."""
    max_non_split_rounding: int = LARGE_SEGMENT
    """Bytes by which a block may exceed a request of at least `max_split_size` (max_non_split_rounding_mb)."""
    roundup_power2_divisions: int | tuple[int, ...] = 0
    """Steps between two powers of two that sizes are rounded up to; 0 rounds to multiples of 512 only. A tuple has one
    number for each of `INTERVALS`: for sizes below 2 MiB, below 4 MiB, and so on."""
    garbage_collection_threshold: float | None = None
    """Share of what the allocator may reserve above which blocks that were not used for long are given back before new
    memory is asked for. torch heeds it only in a process that has called `set_per_process_memory_fraction`."""

    def __post_init__(self) -> None:
        if self.max_split_size is not None and self.max_split_size <= LARGE_SEGMENT:
            raise PlanError(f"max_split_size must be above {LARGE_SEGMENT // MIB} MiB, got {self.max_split_size} bytes")
        if self.max_non_split_rounding < LARGE_SEGMENT:
            raise PlanError(
                f"max_non_split_rounding must be at least {LARGE_SEGMENT // MIB} MiB, "
                f"got {self.max_non_split_rounding} bytes"
            )
        for divisions in self.divisions:
            if divisions < 0 or divisions & (divisions - 1):
                raise PlanError(f"roundup_power2_divisions must be 0 or a power of two, got {divisions}")
        threshold = self.garbage_collection_threshold
        if threshold is not None and not 0 < threshold < 1:
            raise PlanError(f"garbage_collection_threshold must be between 0 and 1, got {threshold}")

    @property
    def divisions(self) -> tuple[int, ...]:
        """`roundup_power2_divisions`, one for each interval."""
        found = self.roundup_power2_divisions
        return (found,) * INTERVALS if isinstance(found, int) else found

    @property
    def text(self) -> str:
        """The settings that are not torch's defaults, as PYTORCH_ALLOC_CONF takes them; empty for none."""
        return ",".join(self._items())

    def _items(self) -> Iterator[str]:
        if self.expandable_segments:
            yield "expandable_segments:True"
        if self.max_split_size is not None:
            yield f"max_split_size_mb:{self.max_split_size // MIB}"
        if self.max_non_split_rounding != LARGE_SEGMENT:
            yield f"max_non_split_rounding_mb:{self.max_non_split_rounding // MIB}"
        divisions = self.divisions
        if len(set(divisions)) > 1:
            rows = ",".join(f"{2**at}:{division}" for at, division in enumerate(divisions))
            yield f"roundup_power2_divisions:[{rows}]"
        elif divisions[0] > 1:
            yield f"roundup_power2_divisions:{divisions[0]}"
        if self.garbage_collection_threshold is not None:
            yield f"garbage_collection_threshold:{self.garbage_collection_threshold:g}"


def parse_settings(text: str) -> AllocatorSettings:
    """Returns the settings that a value of PYTORCH_ALLOC_CONF stands for.

    What does not change what is reserved (`pinned_*`, `release_lock_on_cudamalloc` and others) is left out.

    Raises:
        ConfigError: a value cannot be read, torch would not take it, or it asks for another allocator.
    """
    found: dict[str, object] = {}
    text, at = text.strip(), 0
    while at < len(text):
        item = _ITEM.match(text, at)
        if item is None:
            raise ConfigError(f"allocator settings must be key:value,key:value, got {text!r}")
        found[item[1]], at = item[2].strip(), item.end()
    try:
        return _settings({name: str(value) for name, value in found.items()})
    except ValueError as error:
        raise ConfigError(f"allocator settings {text!r}: {error}") from error


def _settings(found: dict[str, str]) -> AllocatorSettings:
    backend = found.get("backend", "native")
    if backend != "native":
        raise ConfigError(f"backend:{backend} is another allocator, which is not modelled: only the native one is")
    grows = found.get("expandable_segments", "False")
    if grows not in ("True", "False"):
        raise ConfigError(f"expandable_segments must be True or False, got {grows!r}")
    split, rounding = found.get("max_split_size_mb"), found.get("max_non_split_rounding_mb")
    threshold = found.get("garbage_collection_threshold")
    return AllocatorSettings(
        expandable_segments=grows == "True",
        max_split_size=None if split is None else int(split) * MIB,
        max_non_split_rounding=LARGE_SEGMENT if rounding is None else int(rounding) * MIB,
        roundup_power2_divisions=_divisions(found.get("roundup_power2_divisions", "0")),
        garbage_collection_threshold=None if threshold is None else float(threshold),
    )


def _divisions(text: str) -> int | tuple[int, ...]:
    """Returns the divisions of `4`, or of `[256:1,512:2,>:8]`, where a row counts from its size in MiB on."""
    if not text.startswith("["):
        return int(text)
    divisions = [0] * INTERVALS
    first = True
    last = 0
    for row in text.strip("[]").split(","):
        parts = _DIVISION.fullmatch(row)
        if parts is None:
            raise ConfigError(f"roundup_power2_divisions must be N or [SIZE:N,>:N], got {text!r}")
        division = int(parts[2])
        if parts[1] == ">":
            divisions[last + 1 :] = [division] * (INTERVALS - last - 1)
            continue
        last = min(int(parts[1]).bit_length() - 1, INTERVALS - 1)
        if last < 0:
            raise ConfigError(f"roundup_power2_divisions: a size must be at least 1 MiB, got {text!r}")
        if first:
            divisions[:last] = [division] * last
            first = False
        divisions[last] = division
    return divisions[0] if len(set(divisions)) == 1 else tuple(divisions)
