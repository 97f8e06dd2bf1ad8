"""Runs variants in turns: a block of steps each, round after round, so that what the machine does meets them all."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.ratios import Block
from benchmarks.variants import Variant, Watch
from benchmarks.workloads import Training, Workload

Blocks = Mapping[str, Mapping[int, Block]]
"""The blocks of each variant by name, by the number of the round."""


@dataclass(slots=True, kw_only=True)
class Lane:
    """A training run of its own, with what watches it."""

    variant: Variant
    training: Training
    watch: Watch
    settle: Callable[[], None]
    """Waits until the device has done what it was given: the time of a step is what its kernels take."""
    left_at: float

    def run(self, steps: int) -> Block:
        """Runs a block of steps and returns what it took."""
        seconds, traced = [], []
        variant, training, watch = self.variant, self.training, self.watch
        settle = self.settle
        step, around_step, clock = training.step, variant.around_step, time.perf_counter
        watch.resume(clock() - self.left_at)
        begin = clock()
        with variant.around_block(training):
            starting = clock() - begin
            for _ in range(steps):
                before, began = watch.traced_steps(), clock()
                with around_step(training):
                    step()
                settle()
                seconds.append(clock() - began)
                traced.append(watch.traced_steps() > before)
            stopping = clock()
        self.left_at = clock()
        if variant.leaves_garbage:
            gc.collect()
        return Block(seconds=tuple(seconds), traced=tuple(traced), around_seconds=starting + self.left_at - stopping)


def interleave(
    workload: Workload, variants: Sequence[Variant], *, device: torch.device, seconds: float, directory: Path
) -> Blocks:
    """Runs every variant of a workload in turns, in an order drawn anew each round.

    Args:
        workload: what is trained; each variant has a model of its own, with the same values.
        variants: those that take part.
        device: where.
        seconds: how long, without the warm-ups; at least one round is run.
        directory: for what the variants write.
    """
    steps = workload.block if any(variant.surrounds_blocks for variant in variants) else workload.turn
    found: dict[str, dict[int, Block]] = {variant.name: {} for variant in variants}
    draw = random.Random(0)
    number = 0
    for generation in range(workload.generations):
        with ExitStack() as stack:
            lanes = [_lane(variant, workload, device, directory / str(generation), stack) for variant in variants]
            for lane in lanes:
                lane.run(workload.warm_up)
            until, first = time.perf_counter() + seconds / workload.generations, number
            while number == first or time.perf_counter() < until:
                draw.shuffle(lanes)
                for lane in lanes:
                    found[lane.variant.name][number] = lane.run(steps)
                number += 1
    return found


def _lane(variant: Variant, workload: Workload, device: torch.device, directory: Path, stack: ExitStack) -> Lane:
    training = workload.build(device)
    watch = stack.enter_context(variant.attach(training, directory / variant.name))
    settle = torch.cuda.synchronize if device.type == "cuda" else _done
    return Lane(variant=variant, training=training, watch=watch, settle=settle, left_at=time.perf_counter())


def _done() -> None:
    """A CPU has done what it was given."""
