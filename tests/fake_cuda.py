"""CUDA's caching allocator as torch's Python calls show it, with a history in a ring, for machines without one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch


class FakeAllocator:
    """One device. As torch's, its clock is right at a snapshot, and off by `clock_us` at the oldest entry."""

    def __init__(self) -> None:
        self.live: dict[int, int] = {}
        self.streams: dict[int, int] = {}
        """Streams of blocks that are not for the default one: each lies in a segment of its own then."""
        self.pools: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.pool_counters: dict[tuple[int, int], Any] | None = {}
        self.ring: list[dict[str, Any]] = []
        self.max_entries = 0
        self.recording = False
        self.stacks = False
        self.skipped: frozenset[str] = frozenset()
        self.allocations = 0
        self.calls: list[str] = []
        self.clock_us = 0
        self.now_ns = 1_700_000_000_000_000_000
        self._noted_ns: list[int] = []

    def install(self, patch: pytest.MonkeyPatch) -> FakeAllocator:
        """Puts the allocator in the place of torch's calls."""
        memory = torch.cuda.memory
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: self.recording, raising=False)
        patch.setattr(torch._C, "_cuda_annotateMemory", self.annotate, raising=False)
        patch.setattr(memory, "_record_memory_history", self.record)
        patch.setattr(memory, "_snapshot", self.snapshot)
        patch.setattr(memory, "memory_stats_as_nested_dict", lambda _: self.stats())
        patch.setattr(memory, "get_per_process_memory_fraction", lambda _: 1.0)
        patch.setattr(torch.cuda, "memory_snapshot", self.segments)
        patch.setattr(time, "time_ns", self.time_ns)
        return self

    def time_ns(self) -> int:
        """Our clock, which goes on by a microsecond whenever somebody looks at it."""
        self.now_ns += 1000
        return self.now_ns

    def allocate(self, address: int, size: int = 1000, stream: int = 0) -> None:
        """Allocates a block for work on a stream."""
        self.live[address] = size
        if stream:
            self.streams[address] = stream
        self.allocations += 1
        self._write("alloc", address, size)

    def free(self, address: int) -> None:
        """Frees a block that no stream waits for."""
        size = self.live.pop(address)
        self.streams.pop(address, None)
        self._write("free_requested", address, size)
        self._write("free_completed", address, size)

    def annotate(self, address: int, text: str) -> None:
        """`_cuda_annotateMemory` of torch 2.14: an entry without size, with the text."""
        self._write("annotate", address, 0)
        if self.recording:
            self.ring[-1]["user_metadata"] = text

    def record(  # noqa: PLR0917 - as torch has it
        self,
        enabled: str | None = "all",
        context: str | None = "all",
        stacks: str = "all",
        max_entries: int = 1 << 62,
        clear_history: bool = False,
        skip_actions: Sequence[str] | None = None,
    ) -> None:
        """`_record_memory_history` of torch 2.13."""
        self.calls.append("stop" if enabled is None else "record")
        self.recording, self.stacks = enabled is not None, enabled is not None and context is not None
        self.max_entries = max_entries if enabled == "all" else 1
        self.skipped = frozenset(skip_actions or ())
        if enabled is None or clear_history:
            self.ring, self._noted_ns = [], []

    def segments(self, mempool_id: tuple[int, int] | None = None, include_traces: bool = True) -> list[dict[str, Any]]:
        """`memory_snapshot`."""
        found = [*self._segments()] if mempool_id is None else []
        found += [one for pool, kept in self.pools.items() if mempool_id in (None, pool) for one in kept]
        self._write("snapshot", 0, sum(segment["allocated_size"] for segment in found))
        return found

    def snapshot(self) -> dict[str, Any]:
        """`_snapshot`: the trace is copied before the segments are listed."""
        self.calls.append("snapshot")
        now_ns = self.time_ns()
        first = self._noted_ns[0] if self._noted_ns else now_ns
        share = [(now_ns - noted) / max(1, now_ns - first) for noted in self._noted_ns]
        trace = [
            {**entry, "time_us": int(noted + 1000 * self.clock_us * off) // 1000}
            for entry, noted, off in zip(self.ring, self._noted_ns, share, strict=True)
        ]
        return {"device_traces": [trace], "segments": self.segments()}

    def stats(self) -> dict[str, Any]:
        """`memory_stats_as_nested_dict`."""
        size = sum(self.live.values())
        found: dict[str, Any] = {
            name: {"all": {"current": size, "peak": size}}
            for name in ("allocated_bytes", "reserved_bytes", "requested_bytes")
        }
        found["allocation"] = {"all": {"current": len(self.live), "allocated": self.allocations}}
        return found if self.pool_counters is None else found | {"reserved_bytes_by_private_pools": self.pool_counters}

    def _segments(self) -> Iterator[dict[str, Any]]:
        if not self.streams:
            yield self._segment(self.live, 0)
            return
        for at, size in self.live.items():
            yield self._segment({at: size}, at)

    def _segment(self, live: Mapping[int, int], address: int) -> dict[str, Any]:
        frames = [{"filename": "train.py", "line": 1, "name": "f"}] if self.stacks else []
        blocks = [
            {"address": at, "size": size, "requested_size": size, "state": "active_allocated", "frames": frames}
            for at, size in live.items()
        ]
        return {
            "device": 0,
            "address": address,
            "stream": self.streams.get(address, 0),
            "total_size": sum(live.values()),
            "allocated_size": sum(live.values()),
            "segment_pool_id": (0, 0),
            "blocks": blocks,
        }

    def _write(self, action: str, address: int, size: int) -> None:
        if not self.recording or action in self.skipped:
            return
        entry: dict[str, Any] = {"action": action, "addr": address, "size": size, "stream": 0}
        if self.stacks and action != "snapshot":
            entry["frames"] = [{"filename": "train.py", "line": 1, "name": "f"}]
        self.ring.append(entry)
        self._noted_ns.append(self.time_ns())
        del self.ring[: -self.max_entries], self._noted_ns[: -self.max_entries]


class PluggableAllocator:
    """`torch.cuda.memory.CUDAPluggableAllocator`: it gives memory, and refuses whatever else torch asks allocators for.

    Source: torch/csrc/cuda/CUDAPluggableAllocator.cpp, and `isHistoryEnabled` of its base in CUDACachingAllocator.h.
    The refusals are those of torch's C++, below its Python functions, which run as they are.
    """

    REFUSED: ClassVar = {
        "_cuda_memoryStats": "getDeviceStats",
        "_cuda_memorySnapshot": "snapshot",
        "_cuda_isHistoryEnabled": "recordHistory",
        "_cuda_record_memory_history": "recordHistory",
        "_cuda_annotateMemory": "annotate",
        "_cuda_attach_out_of_memory_observer": "attachOutOfMemoryObserver",
        "_cuda_getMemoryFraction": "getMemoryFraction",
        "_cuda_resetPeakMemoryStats": "resetPeakStats",
    }

    def __init__(self) -> None:
        self.refused: list[str] = []

    def install(self, patch: pytest.MonkeyPatch) -> PluggableAllocator:
        """Puts the allocator below torch's calls."""
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda.memory, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
        for call, what in self.REFUSED.items():
            patch.setattr(torch._C, call, partial(self._refuse, what), raising=False)
        return self

    def _refuse(self, what: str, *_: object, **__: object) -> None:
        self.refused.append(what)
        raise RuntimeError(
            f"CUDAPluggableAllocator does not yet support {what}. "
            "If you need it, please file an issue describing your use case."
        )
