"""The laws on a real CUDA device. Runs where there is one: `python -m pytest -m gpu`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from laws.families import FAMILIES, Combination, Recipe, Way
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrace.config import TracerConfig
from memtrace.record.categories import Category, Moment
from memtrace.sources.cuda.cublas import workspace_sizes
from memtrace.sources.cuda.source import CudaEvents
from memtrace.tracing.tracer import Tracer

pytestmark = pytest.mark.gpu

EVERY_STEP = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=1)
COUNTED = TracerConfig(strict=True, port=None, step_log=False, device_poll_seconds=0, trace_every=0)
ROWS, WIDTH, CLASSES = 64, 256, 32
FLOAT = 4


class Net(nn.Module):
    """A few layers; the middle can be checkpointed."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.middle = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(rows))
        if self.use_reentrant is None:
            hidden = self.middle(hidden)
        else:
            hidden = checkpoint(self.middle, hidden, use_reentrant=self.use_reentrant)
        return self.head(hidden)


class Run:
    """Model, optimizer and batch on the device, and a step that never waits for it."""

    def __init__(self, use_reentrant: bool | None = None, *, autocast: bool = False) -> None:
        torch.manual_seed(0)
        self.model = Net(use_reentrant).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.rows = torch.randn(ROWS, WIDTH, device="cuda")
        self.labels = torch.randint(0, CLASSES, (ROWS,), device="cuda")
        self.autocast = autocast

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.model(self.rows), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@pytest.fixture(autouse=True)
def a_clean_device() -> Iterator[None]:
    """Nothing of an earlier test is on the device; the libraries' own workspaces are there."""
    torch.backends.cuda.matmul.allow_tf32 = False
    gc.collect()
    warm = torch.ones(8, 8, device="cuda", requires_grad=True)
    (warm @ warm).sum().backward()
    del warm
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def without_waiting() -> Iterator[None]:
    """Raises where anything waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_the_categories_add_up_to_the_allocators_counter(use_reentrant: bool | None, autocast: bool) -> None:
    """Law 1, byte for byte: the entries come from the history, what was allocated from `requested_bytes`."""
    run = Run(use_reentrant, autocast=autocast)
    with Tracer(run.model, run.optimizer, EVERY_STEP) as tracer:
        for _ in range(5):
            run.step()
    assert all(record.traced for record in tracer.history)
    for record in tracer.history:
        assert set(record.moments) == set(Moment)
        for moment, breakdown in record.moments.items():
            assert breakdown.total_bytes == breakdown.allocated_bytes, (record.step, moment)
    assert tracer.history[-1].allocator is not None
    end = tracer.history[-1].moments[Moment.STEP_END]
    assert end.allocated_bytes == tracer.history[-1].allocator.requested_bytes


def test_the_peak_is_the_allocators_own() -> None:
    """The high-water mark of `requested_bytes` over one step."""
    run = Run()
    with Tracer(run.model, run.optimizer, EVERY_STEP) as tracer:
        run.step()
        run.step()
        torch.cuda.reset_peak_memory_stats()
        run.step()
    expected = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert tracer.history[-1].moments[Moment.PEAK].allocated_bytes == expected


def test_what_outlives_the_step_equals_its_closed_form() -> None:
    """Weights, gradients and AdamW's moments, four bytes each; its step counters are on the CPU."""
    run = Run()
    with Tracer(run.model, run.optimizer, EVERY_STEP) as tracer:
        run.step()
        run.step()
    size = FLOAT * sum(parameter.numel() for parameter in run.model.parameters())
    end = tracer.history[-1].moments[Moment.STEP_END]
    assert end[Category.WEIGHTS] == end[Category.GRADIENTS] == size
    assert end[Category.OPTIMIZER_STATE] == 2 * size
    assert end[Category.INPUTS] == run.rows.nbytes + run.labels.nbytes, "the loss has saved the labels"
    forward_end = tracer.history[-1].moments[Moment.FORWARD_END]
    assert forward_end[Category.ACTIVATIONS] > ROWS * 4 * WIDTH * FLOAT


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert", "t5", "vit", "convnet", "lstm"])
def test_law_1_over_model_families(name: str) -> None:
    """Real models, plain and accumulated."""
    family = next(family for family in FAMILIES if family.name == name)
    for way in (Way.PLAIN, Way.ACCUMULATION):
        combination = Combination(family, Recipe.FP32, way)
        model = combination.build().cuda()
        optimizer = torch.optim.AdamW(model.parameters())
        with Tracer(model, optimizer, EVERY_STEP) as tracer:
            for _ in range(3):
                optimizer.zero_grad()
                for _ in range(way.micro_batches):
                    batch = {key: value.cuda() for key, value in combination.batch().items()}
                    family.loss(model, batch).backward()
                optimizer.step()
        for record in tracer.history:
            assert record.traced
            for moment, breakdown in record.moments.items():
                assert breakdown.total_bytes == breakdown.allocated_bytes, (record.step, moment)


@pytest.mark.parametrize("config", [EVERY_STEP, COUNTED], ids=["traced", "counted"])
def test_memtrace_takes_nothing_of_the_device(config: TracerConfig) -> None:
    """Allocated, reserved and their peaks are the same with and without it, after every step."""

    def readings(trace: bool) -> list[tuple[int, ...]]:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run, found = Run(), []
        with ExitStack() as stack:
            if trace:
                stack.enter_context(Tracer(run.model, run.optimizer, config))
            for _ in range(4):
                run.step()
                allocated, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
                found.append((allocated - before, peak - before, torch.cuda.memory_reserved()))
        return found

    readings(False)
    assert readings(True) == readings(False)


@pytest.mark.parametrize("config", [EVERY_STEP, COUNTED], ids=["traced", "counted"])
def test_memtrace_never_waits_for_the_device(config: TracerConfig) -> None:
    """Attaching, steps, records and detaching, under torch's check that raises where something waits."""
    run = Run()
    run.step()
    with without_waiting():
        with Tracer(run.model, run.optimizer, config) as tracer:
            for _ in range(4):
                run.step()
            assert tracer.snapshot().latest is not None
        run.step()


def test_losses_and_weights_are_the_same_bits() -> None:
    """Law 5."""

    def train(trace: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        run = Run(autocast=True)
        with ExitStack() as stack:
            if trace:
                stack.enter_context(Tracer(run.model, run.optimizer, EVERY_STEP))
            losses = [run.step() for _ in range(4)]
        return losses, list(run.model.parameters())

    bare, traced = train(False), train(True)
    for left, right in zip([*bare[0], *bare[1]], [*traced[0], *traced[1]], strict=True):
        assert torch.equal(left, right)


def test_a_counted_step_estimates_activations_from_counters() -> None:
    """Between two traces: persistent categories exact, activations what the forward pass has added."""
    run = Run()
    with Tracer(run.model, run.optimizer, COUNTED) as tracer:
        for _ in range(3):
            run.step()
    traced, counted = tracer.history[1], tracer.history[2]
    assert traced.traced
    assert not counted.traced
    end = counted.moments[Moment.STEP_END]
    assert end.estimated
    for category in (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE):
        assert end[category] == traced.moments[Moment.STEP_END][category]
    known, guessed = traced.moments[Moment.FORWARD_END], counted.moments[Moment.FORWARD_END]
    assert guessed[Category.ACTIVATIONS] == pytest.approx(known[Category.ACTIVATIONS], rel=0.05)


def test_the_peak_of_a_counted_step_is_estimated_from_the_last_trace() -> None:
    """For the same batch within 5 % of the traced one, for half of it within 10 % of the allocator's own mark."""
    run = Run()
    with Tracer(run.model, run.optimizer, COUNTED) as tracer:
        for _ in range(3):
            run.step()
        traced, counted = tracer.history[1].moments[Moment.PEAK], tracer.history[2].moments[Moment.PEAK]
        assert (counted.estimated, counted.allocated_bytes) == (True, None)
        assert counted.total_bytes == pytest.approx(traced.total_bytes, rel=0.05)
        run.rows, run.labels = run.rows[: ROWS // 2].clone(), run.labels[: ROWS // 2].clone()
        run.step()
        estimated = tracer.history[-1].moments[Moment.PEAK].total_bytes
        torch.cuda.reset_peak_memory_stats()
        run.step()
    exact = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert estimated == pytest.approx(exact, rel=0.1)


def test_a_high_water_mark_and_a_reset_show_on_counted_steps() -> None:
    """A larger batch raises the mark: that is the peak. A reset is noticed, and the next peak is measured again."""
    run = Run()
    with Tracer(run.model, run.optimizer, COUNTED) as tracer:
        for _ in range(3):
            run.step()
        small = run.rows, run.labels
        run.rows = torch.randn(16 * ROWS, WIDTH, device="cuda")
        run.labels = torch.randint(0, CLASSES, (16 * ROWS,), device="cuda")
        run.step()
        mark = torch.cuda.memory_stats()["requested_bytes.all.peak"]
        assert tracer.history[-1].moments[Moment.PEAK].allocated_bytes == mark
        run.rows, run.labels = small
        torch.cuda.reset_peak_memory_stats()
        run.step()
        mark = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert [record.peak_counter_reset for record in tracer.history] == [False] * 4 + [True]
    assert tracer.history[-1].moments[Moment.PEAK].allocated_bytes == mark


@pytest.mark.parametrize("overflow", [False, True], ids=["applied", "skipped"])
def test_a_gradient_scaler(overflow: bool) -> None:
    """A skipped step never reaches the optimizer: its events belong to the next one."""
    run, scaler = Run(), torch.amp.GradScaler("cuda", init_scale=2.0)
    with Tracer(run.model, run.optimizer, EVERY_STEP) as tracer:
        for number in range(4):
            run.optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(run.model(run.rows), run.labels)
            scaler.scale(loss).backward()
            if overflow and number == 1:
                run.model.head.weight.grad.fill_(float("inf"))
            scaler.step(run.optimizer)
            scaler.update()
    assert len(tracer.history) == (3 if overflow else 4)
    for record in tracer.history:
        for breakdown in record.moments.values():
            assert breakdown.total_bytes == breakdown.allocated_bytes


def test_autocast_makes_transient_weights() -> None:
    """A low-precision copy of each matrix whose input wants a gradient; none after the backward pass."""
    run = Run(autocast=True)
    with Tracer(run.model, run.optimizer, EVERY_STEP) as tracer:
        run.step()
        run.step()
    moments = tracer.history[-1].moments
    matrices = [run.model.middle[0].weight, run.model.middle[2].weight, run.model.head.weight]
    assert moments[Moment.FORWARD_END][Category.TRANSIENT_WEIGHTS] == sum(2 * m.numel() for m in matrices)
    assert moments[Moment.BACKWARD_END][Category.TRANSIENT_WEIGHTS] == 0


def test_optimizers_that_step_inside_the_backward_pass() -> None:
    """On a device the backward pass has a thread of its own: the window is closed on the thread of the loop."""
    run = Run()
    own = {parameter: torch.optim.SGD([parameter], lr=0.1, momentum=0.9) for parameter in run.model.parameters()}

    def update(parameter: torch.Tensor) -> None:
        own[parameter].step()
        own[parameter].zero_grad()

    handles = [parameter.register_post_accumulate_grad_hook(update) for parameter in run.model.parameters()]
    with Tracer(run.model, list(own.values()), EVERY_STEP) as tracer:
        for _ in range(3):
            F.cross_entropy(run.model(run.rows), run.labels).backward()
    for handle in handles:
        handle.remove()
    assert [record.step for record in tracer.history] == [1, 2, 3]
    for record in tracer.history:
        assert record.traced
        for moment, breakdown in record.moments.items():
            assert breakdown.total_bytes == breakdown.allocated_bytes, (record.step, moment)


def test_a_leak_is_unattributed() -> None:
    """Logits in a list, to the byte, in each traced step."""
    run, kept = Run(), []
    with Tracer(run.model, run.optimizer, EVERY_STEP) as tracer:
        for _ in range(4):
            run.optimizer.zero_grad()
            logits = run.model(run.rows)
            kept.append(logits.detach())
            F.cross_entropy(logits, run.labels).backward()
            run.optimizer.step()
            del logits
    found = [record.moments[Moment.STEP_END][Category.UNATTRIBUTED] for record in tracer.history]
    grown = [after - before for before, after in pairwise(found[1:])]
    assert grown == [ROWS * CLASSES * FLOAT] * 2


def test_what_cublas_keeps_has_a_name() -> None:
    """The workspaces of the loop's thread and of autograd's are there after every step, by the sizes of this device."""
    gc.collect()
    left = torch.cuda.memory_allocated()  # by the tests before, in this process
    run = Run()
    with Tracer(run.model, run.optimizer, EVERY_STEP) as tracer:
        for _ in range(3):
            run.step()
    one, other, *_ = workspace_sizes(torch.device("cuda", torch.cuda.current_device()))
    end = tracer.history[-1].moments[Moment.STEP_END]
    assert end[Category.WORKSPACES] >= one + other
    assert end[Category.UNATTRIBUTED] < left + one


def test_what_cublas_keeps_of_a_side_stream_has_a_name() -> None:
    """A third workspace, for the products of the loop's thread on a stream of its own."""
    gc.collect()
    run = Run()
    with torch.cuda.stream(torch.cuda.Stream()):
        rows = torch.ones(WIDTH, WIDTH, device="cuda")
        rows @ rows
        del rows
    torch.cuda.synchronize()
    with Tracer(run.model, run.optimizer, EVERY_STEP) as tracer:
        for _ in range(3):
            run.step()
    one, *_ = workspace_sizes(torch.device("cuda", torch.cuda.current_device()))
    end = tracer.history[-1].moments[Moment.STEP_END]
    assert end[Category.WORKSPACES] >= 3 * one
    assert end.total_bytes == end.allocated_bytes


def test_a_ring_that_is_too_small_costs_the_trace_alone() -> None:
    """Events were lost: the step has a counted record and training goes on."""
    run = Run()
    source = CudaEvents(torch.cuda.current_device(), max_events=8)
    with Tracer(run.model, run.optimizer, EVERY_STEP, source=source) as tracer:
        for _ in range(3):
            run.step()
    assert [record.traced for record in tracer.history] == [False] * 3
    assert all(record.moments[Moment.STEP_END].estimated for record in tracer.history)


def test_the_record_has_the_readings_of_allocator_and_device() -> None:
    """Rounded and requested bytes, the device by its UUID, and what is not torch's."""
    run = Run()
    with Tracer(run.model, run.optimizer, EVERY_STEP) as tracer:
        run.step()
        run.step()
        identity = tracer.identity
    record: Any = tracer.latest
    assert record.device == f"cuda:{torch.cuda.current_device()}"
    assert identity.gpu_uuid is not None
    assert record.device_memory.uuid == identity.gpu_uuid
    assert record.allocator.requested_bytes <= record.allocator.allocated_bytes <= record.allocator.reserved_bytes
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    assert abs(record.device_memory.total_bytes - total) < total // 20


def test_offloaded_masters_are_told_apart() -> None:
    """bf16 weights on the device, fp32 masters and their moments on the host: law 1 there, closed forms here."""
    model = Net().cuda().to(torch.bfloat16)
    masters = [p.detach().float().cpu().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters)
    rows = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    with Tracer(model, optimizer, EVERY_STEP) as tracer:
        for _ in range(3):
            model(rows).square().mean().backward()
            for parameter, master in zip(model.parameters(), masters, strict=True):
                master.grad = parameter.grad.float().cpu()
                parameter.grad = None
            optimizer.step()
        record = next(record for record in reversed(tracer.history) if record.traced)
    size = FLOAT * sum(master.numel() for master in masters)
    host = {(key.category, key.component): found for key, found in record.host.items()}
    assert host[Category.MASTER_WEIGHTS, ""] == host[Category.GRADIENTS, ""] == size
    assert host[Category.OPTIMIZER_STATE, "exp_avg"] == host[Category.OPTIMIZER_STATE, "exp_avg_sq"] == size
    for moment in record.moments.values():
        assert moment.total_bytes == moment.allocated_bytes
        assert moment[Category.MASTER_WEIGHTS] == 0


@pytest.mark.parametrize("config", [EVERY_STEP, COUNTED], ids=["traced", "counted"])
def test_nothing_of_a_step_that_was_given_up_is_kept(config: TracerConfig) -> None:
    """Losses that are thrown away, and a step that fails for lack of memory: what they had made is gone at once."""
    run = Run()
    with Tracer(run.model, run.optimizer, config):
        for _ in range(3):
            run.step()
        gc.collect()
        before = torch.cuda.memory_allocated()
        for _ in range(5):
            run.model(run.rows)
        assert torch.cuda.memory_allocated() == before
        try:
            kept = run.model(run.rows)
            torch.empty(2**50, device="cuda")
        except torch.OutOfMemoryError:
            kept = None
        assert kept is None
        assert torch.cuda.memory_allocated() == before
        run.step()


def test_a_step_that_the_history_has_no_room_for_is_traced_from_its_last_micro_batch_on() -> None:
    """Marked so, and the categories add up at each of its moments."""
    run, micro_batches = Run(), 40
    source = CudaEvents(torch.cuda.current_device(), max_events=10_400)
    with Tracer(run.model, run.optimizer, EVERY_STEP, source=source) as tracer:
        for _ in range(4):
            for _ in range(micro_batches):
                F.cross_entropy(run.model(run.rows), run.labels).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    assert [record.traced_from_micro_batch for record in tracer.history[-2:]] == [micro_batches] * 2
    for record in tracer.history[-2:]:
        assert record.traced
        for breakdown in record.moments.values():
            assert breakdown.total_bytes == breakdown.allocated_bytes
