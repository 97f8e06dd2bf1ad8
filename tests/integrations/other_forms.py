"""What is in docs/engines.md beside forms of loops and ways to update: the records, and what bounds the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from attribution import test_kept_on_ctx, test_leftovers
from attribution.test_further_models import make_teacher
from attribution.test_quantised_bases import INSIDE, Awq, EightBit, Gptq, Hqq, WithAdapter
from engines import test_further_loops
from laws import test_counted, test_threads
from laws.loop_forms import WIDTH, Network, rows, update
from laws.test_loop_forms import EVERY_STEP
from torch import nn
from tracing import test_dropped

from memtrace.record.breakdown import StepRecord
from memtrace.tracing.tracer import Tracer

STEPS, FIRST = 14, 2
"""Steps of each loop, and those that are left out: what it keeps from its first step on is there within seconds, and
in the series a step stands for a quarter of an hour."""

KEEP_NOTHING = frozenset({"gradients dropped, for_the_inputs", "gradients dropped, moved_and_back"})
"""Loops that have tensors of their own where the optimizer has stepped, and none when their step returns."""

Loop = Callable[[Any, torch.optim.Optimizer], Iterator[object]]


def over_and_over(step: Callable[[Any, torch.optim.Optimizer], object]) -> Loop:
    """A loop of one step."""

    def run(model: Any, optimizer: torch.optim.Optimizer) -> Iterator[object]:
        while True:
            yield step(model, optimizer)

    return run


def changing(model: test_counted.Net, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Parameters, states and buffers are replaced, one kind after the other."""
    changes = (test_counted.data_replaced, test_counted.optimizer_loaded, test_counted.state_replaced)
    while True:
        for change in changes:
            yield update(model(torch.randn(4, WIDTH)), optimizer)
            change(model, optimizer)


def beside_a_teacher(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """A model that nobody names runs in each step."""
    teacher = make_teacher()
    while True:
        batch = rows()
        with torch.no_grad():
            wanted = teacher(batch)
        yield update((model(batch) - wanted).square().mean(), optimizer)


def on_ctx(step: Callable[[nn.Module, torch.Tensor], None]) -> Loop:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
        step(model, torch.randn(test_kept_on_ctx.ROWS, WIDTH))
        optimizer.step()
        return optimizer.zero_grad()

    return over_and_over(run)


def with_adapters(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    return update(model(torch.randn(4, INSIDE)).square().mean(), optimizer)


def on_another_thread(model: nn.Module, optimizer: torch.optim.Optimizer) -> object:
    return test_threads.on_a_new_thread(lambda: update(model(rows()).square().mean(), optimizer))


LOOPS: Mapping[str, tuple[Callable[[], nn.Module], Loop]] = {
    "replaced parameters, states and buffers": (test_counted.Net, changing),
    "a model that nobody names": (Network, beside_a_teacher),
    "on another thread": (Network, over_and_over(on_another_thread)),
    **{
        f"updates that are left out, {loop.__name__}": (test_dropped.network, loop)
        for loop in (test_dropped.scaled, test_dropped.accumulated, test_dropped.thrown_away)
    },
    **{
        f"gradients dropped, {step.__name__}": (test_dropped.network, over_and_over(step))
        for step in (test_dropped.for_the_inputs, test_dropped.moved_and_back)
    },
    **{
        f"kept on ctx, {step.__name__}": (lambda: test_kept_on_ctx.Layers(test_kept_on_ctx.OnCtx), on_ctx(step))
        for step in (test_kept_on_ctx.dropped, test_kept_on_ctx.kept)
    },
    **{
        f"outputs that stay, {loop.__name__}": (test_leftovers.TwoHeads, loop)
        for loop in (test_leftovers.named, test_leftovers.in_a_function, test_leftovers.in_turns)
    },
    **{
        f"a base of {base.__name__}": (lambda base=base: WithAdapter(base()), over_and_over(with_adapters))
        for base in (Gptq, Awq, Hqq, EightBit)
    },
}
"""By name: what makes the model, and what trains it."""

assert LOOPS.keys() >= KEEP_NOTHING


def records() -> Iterator[tuple[str, Sequence[StepRecord]]]:
    """Yields the history of each loop without its first steps; of two tracers at once, both."""
    for name, (make, loop) in LOOPS.items():
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with Tracer(model, optimizer, EVERY_STEP) as tracer:
            training = loop(model, optimizer)
            assert sum(1 for _ in islice(training, STEPS)) == STEPS
        yield name, tracer.history[FIRST:]
    for name, begin in test_further_loops.LOOPS.items():
        model, optimizer, step = begin()
        with Tracer(model, optimizer, EVERY_STEP) as tracer:
            for _ in range(STEPS * test_further_loops.CALLS_OF_A_STEP.get(name, 1)):
                step(torch.randn(test_further_loops.ROWS, test_further_loops.WIDTH))
        yield f"a further loop, {name}", tracer.history[FIRST:]
    models = [Network(), Network()]
    optimizers = [torch.optim.AdamW(model.parameters()) for model in models]
    with Tracer(models[0], optimizers[0], EVERY_STEP) as first, Tracer(models[1], optimizers[1], EVERY_STEP) as second:
        for _ in range(STEPS):
            for model, optimizer in zip(models, optimizers, strict=True):
                update(model(rows()).square().mean(), optimizer)
    yield "two tracers, the first", first.history[FIRST:]
    yield "two tracers, the second", second.history[FIRST:]


UNCLAIMED = 0.01
"""Share of the peak that nobody claims at most, by the tests of what is not run here."""

BOUNDED = {
    "buckets of DDP": "tests/engines/test_ddp.py::test_hardly_anything_is_unattributed",
    "DDP around parts": "tests/engines/test_ddp_parts.py::test_each_wrapped_part_has_its_buckets",
    "every `optim=`": "tests/engines/test_every_optimizer.py::test_categories_add_up_and_nothing_is_left",
    "FSDP1": "tests/engines/test_fsdp1.py",
    "LoRA on whole": "tests/engines/test_peft.py::test_categories_add_up_and_nothing_is_left",
    "the same under Trainer": "tests/engines/test_other_trainers.py",
    "TRL's trainers": "tests/engines/test_trl_trainers.py::test_categories_add_up_and_nothing_is_left",
    "tensors, rows and stages": "tests/engines/test_parallel.py::test_each_rank_has_its_part",
}
"""Rows of the page whose tests hold what nobody claims under that share, by the words that they begin with."""

NOT_TRACED = {
    "no module is called": "no step has a forward pass",
    "a caller that was compiled": "no step has a forward pass",
    "parts of a step on several threads": "no step is traced",
    "memory that runs out": "the run is over",
    "MPS, XPU, NPU": "no step is traced",
    "NVML without memory": "other readings of a run that is here",
    "nn.DataParallel": "as a plain loop, on the watched device",
    "a leak of one": "raises the alert",
}
"""Rows that have no figures of their own, and why."""

HERE = {
    "two tracers": "two tracers",
    "the whole loop on another thread": "on another thread",
    "parameters, state or buffers": "replaced parameters",
    "reference, teacher": "a model that nobody names",
    "the same, named by nobody": "a model that nobody names",
    "several optimizers": "both in one loss",
    "a GradScaler": "updates that are left out",
    "gradients dropped": "gradients dropped",
    "updates inside": "dictionary",
    "GPTQ, AWQ, HQQ": "a base of",
    "tensors on the `ctx`": "kept on ctx",
    "outputs that the loop keeps": "outputs that stay",
    "Accelerate (`accumulate`": "a further loop",
}
"""Rows that are run, and how the names of their runs begin; those of the first table have the name of their form."""
