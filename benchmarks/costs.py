"""What memtrace takes besides the time of steps: attaching, counting a step, replaying a traced one, reading CUDA's
history, resident memory.

usage: python -m benchmarks.costs [attach] [counted] [replay] [history] [memory]

Prints each figure beside its bound and writes it to benchmarks/results/. Every measurement runs in a process of its
own, one after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from benchmarks.counted import counted
from benchmarks.results import environment, write
from benchmarks.workloads import WORKLOADS

PARAMETERS = 10_000
ATTACH_SECONDS = 0.1
EVENTS = 100_000
REPLAY_SECONDS = 0.5
REPLAY_GROWTH = 12.0
"""How many times longer ten times the events may take."""
HISTORY = Path(__file__).parents[1] / "tests" / "fixtures" / "gpu" / "traces" / "llama.json"
HISTORY_EVENTS = 4_000
HISTORY_SECONDS = 0.01
MEMORY_BYTES = 60_000_000
REPETITIONS = 7
STEPS = 10
"""Steps over which resident memory is looked at."""

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"what to measure: {', '.join(MEASUREMENTS)}; all by default")
    parser.add_argument("--results", type=Path, help="directory to write the results to instead")
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    options = parser.parse_args()
    if unknown := set(options.names) - set(MEASUREMENTS):
        parser.error(f"there is no measurement {', '.join(sorted(unknown))}; expected {', '.join(MEASUREMENTS)}")
    torch.set_num_threads(1)
    if options.here:
        print(json.dumps([row for name in options.names for row in MEASUREMENTS[name]()]))
        return 0
    kept = True
    for name in options.names or MEASUREMENTS:
        command = [sys.executable, "-m", "benchmarks.costs", "--here", name]
        rows = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        for row in rows:
            show(row)
            kept &= row["bound"] is None or row["value"] <= row["bound"]
        print(write(f"costs-{name}", {"rows": rows}, environment(torch.device("cpu")), options.results))
    return 0 if kept else 1


def show(row: Row) -> None:
    """Prints one figure."""
    bound = row["bound"]
    verdict = "" if bound is None else f"  at most {bound:g}: {'kept' if row['value'] <= bound else 'NOT KEPT'}"
    print(f"  {row['what']:<72} {row['value']:12.6g} {row['unit']}{verdict}")


def attach() -> list[Row]:
    """Seconds to attach to a model with many parameters: before its first step, and with optimizer state.

    The tracer, its endpoint and its log are made and entered; taking them down is not counted.
    """
    from memtrace import MemoryTracer, TracerConfig

    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(PARAMETERS // 2))
    optimizer = torch.optim.AdamW(model.parameters())

    def once() -> Times:
        with tempfile.TemporaryDirectory() as directory:
            begin = Times.now()
            with MemoryTracer(model, optimizer, TracerConfig(port=0, log_dir=directory, strict=True, quiet=True)):
                return Times.since(begin)

    once()  # loads what only attaching needs
    fresh = measured(once)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    resumed = measured(once)
    what = f"attach to {PARAMETERS:,} parameters"
    return [
        {"what": what, **fresh, "unit": "s", "bound": ATTACH_SECONDS},
        {"what": f"{what} that have gradients and AdamW's state", **resumed, "unit": "s", "bound": None},
    ]


def replay() -> list[Row]:
    """Seconds from the events of a traced step to its breakdowns, for a step and for one of ten times the events."""
    from memtrace.attribution.timeline import replay

    found = {}
    for events in (EVENTS, 10 * EVENTS):
        window, base, journal, marks = traced_step(events)

        def once() -> Times:
            begin = Times.now()
            replay(window, base, journal).moments(marks)  # noqa: B023
            return Times.since(begin)

        found[events] = measured(once, repetitions=3 if events > EVENTS else REPETITIONS)
    growth = found[10 * EVENTS]["value"] / found[EVENTS]["value"]
    what = "breakdowns of a traced step of {:,} events"
    return [
        {"what": what.format(EVENTS), **found[EVENTS], "unit": "s", "bound": REPLAY_SECONDS},
        {"what": what.format(10 * EVENTS), **found[10 * EVENTS], "unit": "s", "bound": None},
        {
            "what": "ten times the events take so many times as long",
            "value": growth,
            "unit": "x",
            "bound": REPLAY_GROWTH,
        },
    ]


def history() -> list[Row]:
    """Seconds from a recorded history of CUDA's allocator to the events of a window and their replay, and growth."""
    from memtrace.attribution.garbage import uncollected
    from memtrace.attribution.timeline import replay
    from memtrace.sources.cuda.history import parse_window

    recorded = json.loads(HISTORY.read_text(encoding="utf-8"))["snapshot"]
    once_through = recorded["device_traces"][0]
    found = {}
    for events in (HISTORY_EVENTS, 10 * HISTORY_EVENTS):
        trace = once_through * (2 * events // len(once_through) + 1)
        changes = [entry for entry in trace if entry["action"] in {"alloc", "free_completed"}][:events]
        snapshot = recorded | {"device_traces": [changes]}

        def once() -> Times:
            begin = Times.now()
            with uncollected():  # as the tracer does
                replay(parse_window(snapshot, 0, 0, 1 << 62, ()), (), ())  # noqa: B023
            return Times.since(begin)

        found[events] = measured(once)
    few, many = found.values()
    return [
        {"what": f"CUDA's history of {HISTORY_EVENTS:,} events read and replayed", **few, "unit": "s"}
        | {"bound": HISTORY_SECONDS},
        {
            "what": "ten times the history takes so many times as long",
            "value": many["value"] / few["value"],
            "unit": "x",
            "bound": REPLAY_GROWTH,
        },
    ]


def traced_step(events: int) -> Any:
    """Returns a window of so many events with the base, journal and marks of a step that makes its breakdowns.

    Half of the blocks of the forward pass are saved for the backward pass, which frees them last in, first out, between
    temporaries of its own; there is one gradient for ten saved blocks, and addresses come back as they do in a run.
    """
    from memtrace.attribution.timeline import StepMarks
    from memtrace.record.categories import Category
    from memtrace.sources.events import Event, Events, Tag, TagEvent, Window

    draw = random.Random(0)
    weight, gradient = Tag(Category.WEIGHTS, "trainable", "float32"), Tag(Category.GRADIENTS, "", "float32")
    activation = Tag(Category.ACTIVATIONS, "", "bfloat16")
    base = [TagEvent(0, address, 1 << 20, weight) for address in range(1, events // 100)]
    happened: list[Event] = []
    journal: list[TagEvent] = []
    free = list(range(len(base) + 1, len(base) + events))
    now = 1_000

    def allocate(size: int) -> int:
        nonlocal now
        now += 1_000
        address = free.pop()
        happened.append(Event(now, address, size))
        return address

    def release(address: int, size: int) -> None:
        nonlocal now
        now += 1_000
        happened.append(Event(now, address, -size))
        free.append(address)

    def temporary() -> None:
        size = draw.randrange(512, 1 << 20)
        release(allocate(size), size)

    saved: list[tuple[int, int]] = []
    while len(happened) < events // 2 - 3:
        temporary()
        size = draw.randrange(512, 1 << 20)
        saved.append((allocate(size), size))
        journal.append(TagEvent(now, saved[-1][0], size, activation))
    forward_end_ns = now
    while saved:
        temporary()
        if len(saved) % 10 == 0:
            address = allocate(1 << 20)
            journal.append(TagEvent(now, address, 1 << 20, gradient))
        release(*saved.pop())
    while len(happened) < events:
        allocate(512)
    window = Window(begin_ns=0, end_ns=now, events=Events.of(happened), live_at_begin=None)
    marks = StepMarks(begin_ns=1, end_ns=now, forward_end_ns=forward_end_ns, backward_end_ns=now)
    return window, base, journal, marks


def memory() -> list[Row]:
    """Bytes of resident memory that memtrace adds to a run up to the end of its first traced step.

    Counted from a run that has made its steps without it, so that import, endpoint, log, hooks and the first use of
    torch's profiler are all in it.
    """
    workload = WORKLOADS["llama"]
    training = workload.build(torch.device("cpu"))
    before = resident(training.step)
    from memtrace import MemoryTracer, TracerConfig

    with tempfile.TemporaryDirectory() as directory:
        config = TracerConfig(port=0, log_dir=directory, strict=True, quiet=True)
        with MemoryTracer(training.model, training.optimizer, config) as tracer:
            while not tracer.snapshot().totals.traced_steps:
                training.step()
            traced = resident(training.step)
    added = {"value": traced - before, "unit": "B", "bound": MEMORY_BYTES}
    return [{"what": "resident memory added, after the first traced step", **added}]


def resident(step: Callable[[], None]) -> int:
    """Returns the most that is resident after one of some steps, in bytes: what the C library keeps differs."""
    most = 0
    for _ in range(STEPS):
        step()
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        most = max(most, pages * resource.getpagesize())
    return most


class Times(NamedTuple):
    """Seconds of the clock on the wall and of the processor: on a busy machine the first has others' work in it."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> Self:
        return cls(time.perf_counter(), time.process_time())

    @classmethod
    def since(cls, begin: Self) -> Self:
        end = cls.now()
        return cls(end.wall - begin.wall, end.processor - begin.processor)


def measured(once: Callable[[], Times], *, repetitions: int = REPETITIONS) -> dict[str, Any]:
    """Returns the median of some repetitions, their range, and the median of the processor's time."""
    times = [once() for _ in range(repetitions)]
    walls = [found.wall for found in times]
    return {
        "value": median(walls),
        "least": min(walls),
        "most": max(walls),
        "processor_seconds": median(found.processor for found in times),
        "repetitions": repetitions,
    }


MEASUREMENTS: dict[str, Callable[[], list[Row]]] = {
    "attach": attach,
    "counted": counted,
    "replay": replay,
    "history": history,
    "memory": memory,
}

if __name__ == "__main__":
    raise SystemExit(main())
