"""Private calls into torch that record: its profiler, and the history of CUDA's allocator.

Beside `torch_private`, and by its rules: a missing private name costs a feature, never the run, and each function says
what its caller gets then.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain, compress
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler as autograd_profiler

from memtrace.sources import torch_private
from memtrace.sources.events import Events

_UNREAD = frozenset({"free_requested"})
"""Actions of the history that say nothing about which blocks are live."""


_PROBES = 4
"""References that a number is given before torch may take one from it."""

_take_reference, _drop_reference = ctypes.pythonapi.Py_IncRef, ctypes.pythonapi.Py_DecRef
for _function in (_take_reference, _drop_reference):
    _function.argtypes, _function.restype = [ctypes.py_object], None


class ProfilerUnavailable(RuntimeError):
    """This build of torch does not have the profiler calls that the CPU source needs."""


def start_memory_profiler() -> None:
    """Starts recording memory events of the CPU allocator on this thread and the backward threads it starts.

    The public `torch.profiler.profile` has no way to leave operators out: with it a step of a small model costs ten
    times more to record and to read back. Operators are left out here by switching RecordFunction off for as long
    as the recording lasts.

    Raises:
        ProfilerUnavailable: torch has changed; the caller does without traced steps.
    """
    try:
        config = torch.autograd.ProfilerConfig(  # type: ignore[attr-defined]
            torch.autograd.ProfilerState.KINETO,  # type: ignore[attr-defined]
            False,  # input shapes
            True,  # memory
            False,  # stacks
            False,  # flops
            False,  # modules
            torch._C._profiler._ExperimentalConfig(),
            "",  # trace id
        )
        activities = {torch.profiler.ProfilerActivity.CPU}
        _silence_allocator()  # before there is a recording that a fault in it would leave on
        with _kineto_silenced():
            torch.autograd._prepare_profiler(config, activities)  # type: ignore[attr-defined]
            torch.autograd._enable_profiler(config, activities)  # type: ignore[attr-defined]
        torch.autograd._enable_record_function(False)  # type: ignore[attr-defined]
    except (AttributeError, TypeError) as error:
        _give_back_log_level()
        raise ProfilerUnavailable(f"torch {torch.__version__} cannot record memory events: {error}") from error


def stop_memory_profiler() -> tuple[Events, int]:
    """Stops the recording.

    Returns:
        What happened to the blocks of a CPU, and by how many bytes the profiler's own count of them has changed.
    """
    torch.autograd._enable_record_function(True)  # type: ignore[attr-defined]
    _give_back_log_level()
    result = torch.autograd._disable_profiler()  # type: ignore[attr-defined]
    return _events(result.experimental_event_tree())


def give_up_memory_profiler() -> None:
    """Forgets a recording that somebody else's profiler has replaced, without touching theirs."""
    torch.autograd._enable_record_function(True)  # type: ignore[attr-defined]
    _give_back_log_level()


_UNTOLD = {"KINETO_LOG_LEVEL": "6"}
"""What Kineto has not been told yet: nothing once it has made its first recording for memtrace."""
_ERRORS = 2
"""torch's C++ level of errors, above that of warnings."""
_LEVEL_BEFORE: dict[str, int] = {}
"""torch's C++ level as the user has it, while memtrace has raised it."""


@contextmanager
def _kineto_silenced() -> Iterator[None]:
    """Keeps Kineto from writing two lines a recording, unless the user has chosen its level.

    It takes its level from the environment when the first recording of the process begins, and from nothing else. The
    user's own profiler writes less, too, where memtrace came first: Kineto has one level.
    """
    told = {name: level for name, level in _UNTOLD.items() if name not in os.environ}
    _UNTOLD.clear()
    os.environ.update(told)
    try:
        yield
    finally:
        for name in told:
            os.environ.pop(name, None)


@cache
def _log_level() -> ctypes.c_int | None:
    """Returns the level from which on torch's C++ code logs, to be read and set; None where it cannot be had."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
        return ctypes.c_int.in_dll(library, "FLAGS_caffe2_log_level")
    except (OSError, ValueError):
        return None


def _silence_allocator() -> None:
    """Keeps the CPU allocator from warning of each thousandth free of a block that is older than the recording.

    There is no other way to tell it: for as long as memtrace records, torch's C++ code logs errors only.
    """
    level = _log_level()
    if level is not None and level.value < _ERRORS:
        _LEVEL_BEFORE.setdefault("c10", level.value)
        level.value = _ERRORS


def _give_back_log_level() -> None:
    level = _log_level()
    if level is not None and "c10" in _LEVEL_BEFORE:
        level.value = _LEVEL_BEFORE.pop("c10")


def _events(nodes: list[Any]) -> tuple[Events, int]:
    # Nearly all nodes are allocations, thousands of them, and each attribute of one is a call into torch: the functions
    # of the properties are called themselves, in rows, and only those that are used.
    node: Any = torch._C._profiler._ProfilerEvent
    allocation: Any = torch._C._profiler._ExtraFields_Allocation
    fields = [*map(node.extra_fields.fget, nodes)]
    while {*map(type, fields)} - {allocation}:
        below = [[one] if type(of) is allocation else one.children for one, of in zip(nodes, fields, strict=True)]
        nodes = [*chain.from_iterable(below)]
        fields = [*map(node.extra_fields.fget, nodes)]
    if torch_private.current_accelerator() is not None:  # else this build of torch has no other blocks
        cpu = torch.device("cpu")
        kept = [of.device == cpu for of in fields]
        nodes, fields = [*compress(nodes, kept)], [*compress(fields, kept)]
    times_ns = [*map(node.start_time_ns.fget, nodes)]
    if times_ns != (ascending := sorted(times_ns)):  # those of one thread come after those of another
        order = sorted(range(len(times_ns)), key=times_ns.__getitem__)
        times_ns, fields = ascending, [fields[position] for position in order]
    deltas = [*map(allocation.alloc_size.fget, fields)]
    counted = fields[-1].total_allocated - fields[0].total_allocated + deltas[0] if fields else 0
    return Events(times_ns, [*map(allocation.ptr.fget, fields)], deltas), counted


def profiler_is_recording() -> bool:
    """Returns whether a profiler, memtrace's own or somebody else's, records on this thread."""
    return bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


def user_profiler_is_prepared() -> bool:
    """Returns whether a `torch.profiler.profile` of the user's is warming up or records.

    Nothing public tells of one that is prepared and does not record yet; whoever starts a recording then takes what it
    has prepared from it, and it crashes. Looks at all objects of the process, for some 50 ms, where one was ever made
    that did not end with its `with` block. False where torch has changed.
    """
    counts = getattr(getattr(autograd_profiler, "KinetoStepTracker", None), "_step_dict", ())
    if getattr(torch.profiler.profiler, "PROFILER_STEP_NAME", "ProfilerStep") not in counts:
        return False
    sessions = [getattr(found, "profiler", None) for found in gc.get_objects() if type(found) is torch.profiler.profile]
    return any(session is not None and getattr(session, "kineto_results", 0) is None for session in sessions)


def user_profiler_is_recording() -> bool:
    """Returns whether a profiler started through torch's Python API records; memtrace's own does not count."""
    return bool(getattr(autograd_profiler, "_is_profiler_enabled", False))


def record_memory_history(max_entries: int) -> frozenset[str] | None:
    """Starts CUDA's allocator history without stacks, in an empty ring of `max_entries` events.

    Call only where nobody else records: what a ring of ours held from the window before is cleared, so that a snapshot
    does not carry it along.

    Returns:
        The actions that are left out: those that nobody reads, where torch (2.13) can leave some out. None where the
        allocator keeps no history (cudaMallocAsync, a pluggable one).
    """
    record = torch.cuda.memory._record_memory_history
    known = inspect.signature(record).parameters
    left_out = _UNREAD if "skip_actions" in known else frozenset()
    more: dict[str, Any] = {"skip_actions": sorted(left_out)} if left_out else {}
    if "clear_history" in known:  # torch 2.6 empties the ring whenever a recording ends
        more["clear_history"] = True
    try:
        record(enabled="all", context=None, stacks="python", max_entries=max_entries, **more)
    except RuntimeError:
        return None
    return left_out


def skips_requested_frees() -> bool:
    """Returns whether torch can leave requested frees out of the history: two entries an allocation, not three."""
    return "skip_actions" in inspect.signature(torch.cuda.memory._record_memory_history).parameters


def stop_memory_history() -> None:
    """Stops CUDA's allocator history."""
    torch.cuda.memory._record_memory_history(enabled=None)


def memory_history_is_recording() -> bool | None:
    """Returns whether somebody records CUDA's allocator history; None where torch or the allocator cannot tell."""
    probe = getattr(torch._C, "_cuda_isHistoryEnabled", None)
    try:
        return None if probe is None else bool(probe())
    except RuntimeError:  # an allocator without a history
        return None


def annotate_memory(address: int, text: str) -> bool:
    """Writes a text on the block at an address, as an entry of the history that is recorded of CUDA's allocator.

    `torch.cuda.memory._annotate_tensor` does the same for a tensor, and the ledger has storages. It takes a stack with
    each entry where the history is recorded with stacks. Neither allocates on the device nor synchronises it.

    Returns:
        False where torch (before 2.14) or the allocator cannot.
    """
    annotate = getattr(torch._C, "_cuda_annotateMemory", None)
    if annotate is None:
        return False
    try:
        annotate(address, text)
    except RuntimeError:
        return False
    return True


def memory_snapshot_with_history() -> dict[str, Any]:
    """Returns `torch.cuda.memory._snapshot()`: segments and `device_traces`."""
    snapshot: dict[str, Any] = torch.cuda.memory._snapshot()
    return snapshot


def list_segments(pool: tuple[int, int] | None = None, **options: bool) -> list[Any]:
    """Returns `torch.cuda.memory_snapshot()` of all pools, or of one.

    torch (2.11 to 2.14 at least) takes a reference from each number that it hands to its C++ there. A number that is
    nobody else's is freed while it is in use, and the process dies; before Python 3.12 even False wears out. Each is
    given one before.

    Raises:
        RuntimeError: the allocator does not list them.
    """
    if _listing_takes_references():
        for number in (*(pool or (0, 0)), *options.values()):
            _take_reference(number)
    given = options if pool is None else options | {"mempool_id": pool}
    found: list[Any] = torch.cuda.memory_snapshot(**given)  # type: ignore[no-untyped-call]
    return found


@cache
def _listing_takes_references() -> bool:
    """Returns whether torch takes a reference from the numbers that listing segments is given: it is asked once."""
    listing = getattr(torch._C, "_cuda_memorySnapshot", None)
    known = inspect.signature(torch.cuda.memory_snapshot).parameters
    if listing is None or "mempool_id" not in known:
        return False
    number = int("1" * 18)  # not a constant: nobody else holds it
    for _ in range(_PROBES):
        _take_reference(number)
    given = (number, 1, False) if "include_traces" in known else (number, 1)
    before = sys.getrefcount(number)
    with suppress(RuntimeError, TypeError):  # an allocator that lists nothing; a torch that lists all pools or none
        listing(given)
    taken = before - sys.getrefcount(number)
    for _ in range(_PROBES - taken):
        _drop_reference(number)
    return taken > 0


def attach_oom_observer(observer: Callable[[int, int, int, int], None]) -> bool:
    """Calls `observer(device, requested, total, free)` whenever CUDA's caching allocator fails; bytes.

    There is no public way to learn of it before the exception has unwound what held the memory. It cannot be taken off
    again. It is called without the allocator's lock, on the thread that asked, and must not allocate on the device,
    synchronise or raise. CUDA must be initialised.

    Returns:
        False where torch has no such call (a CPU build) or the allocator none (cudaMallocAsync, a pluggable one): the
        exception is then all that tells.
    """
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None:
        return False
    try:
        attach(observer)
    except RuntimeError:
        return False
    return True
