"""The fault table, in this process: each row ends with the weights that the training has without memtrace."""

from __future__ import annotations

import copy
import io
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters.test_hf_trainer import make_model, make_trainer
from faults.fault_training import assert_same, batches, make, run_steps, state_of, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from memtrace import MemoryTracer, MemTraceCallback, TracerConfig
from memtrace.exporters.run_directory.steplog import read_step_log

STEPS = 6


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """The final state without memtrace."""
    return train(steps=STEPS)


def tracer_of(model: nn.Module, optimizer: torch.optim.Optimizer, log_dir: Path, **settings: Any) -> MemoryTracer:
    """Returns a tracer that is not strict, as users have it: traced and counted steps, log and endpoint."""
    known = {"port": 0, "log_dir": log_dir, "trace_every": 2, "run_name": "fault"}
    return MemoryTracer(model, optimizer, TracerConfig(**{**known, **settings}))


def assert_recorded(tracer: MemoryTracer, steps: int = STEPS) -> None:
    """Asserts that memtrace was up to the end and has every step."""
    assert tracer.snapshot().up
    assert [record.step for record in tracer.history] == list(range(1, steps + 1))


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_port_taken(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    """The endpoint moves to the next free port."""
    tracers: list[MemoryTracer] = []
    with taken_port() as port:

        @contextmanager
        def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
            with tracer_of(model, optimizer, tmp_path, port=port) as tracer:
                assert tracer.url
                assert f":{port}/" not in tracer.url
                yield
                tracers.append(tracer)

        assert_same(train(attach, STEPS), expected)
    assert_recorded(tracers[0])


def test_log_on_a_full_disk(tmp_path: Path, expected: list[torch.Tensor], caplog: pytest.LogCaptureFixture) -> None:
    """A log that takes no byte is given up with one warning; metrics go on."""
    (tmp_path / "steps-rank0.jsonl").symlink_to("/dev/full")
    model, optimizer = make()
    with tracer_of(model, optimizer, tmp_path) as tracer:
        run_steps(model, optimizer, batches(STEPS))
        assert_recorded(tracer)
    assert_same(state_of(model), expected)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text


def test_log_directory_gone_while_training(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    """A directory that somebody deletes costs the log, and nothing else."""
    directory = tmp_path / "run"
    model, optimizer = make()
    rows = batches(STEPS)
    with tracer_of(model, optimizer, directory) as tracer:
        run_steps(model, optimizer, rows[:3])
        shutil.rmtree(directory)
        run_steps(model, optimizer, rows[3:])
        assert_recorded(tracer)
    assert_same(state_of(model), expected)


def users_profiler() -> AbstractContextManager[Any]:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def users_saved_tensor_hooks() -> AbstractContextManager[Any]:
    """Hooks that keep something else than the tensor, and give an equal one back."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (tensor.detach().clone(), tensor.requires_grad), lambda packed: packed[0]
    )


@pytest.mark.parametrize("around", [True, False], ids=["around all", "in the middle"])
@pytest.mark.parametrize(
    "theirs",
    [
        users_profiler,
        users_saved_tensor_hooks,
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.disable_saved_tensors_hooks("not here"),
        torch.autograd.detect_anomaly,
    ],
    ids=["profiler", "saved_tensors_hooks", "save_on_cpu", "saved_tensors_hooks forbidden", "anomaly mode"],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_something_of_the_users_own_is_active(
    tmp_path: Path, expected: list[torch.Tensor], theirs: Callable[[], AbstractContextManager[Any]], around: bool
) -> None:
    """A profiler or hooks of the user work as ever, around the whole training or around some steps of it."""
    model, optimizer = make()
    rows = batches(STEPS)
    with ExitStack() as stack:
        outer = stack.enter_context(theirs()) if around else None
        tracer = stack.enter_context(tracer_of(model, optimizer, tmp_path))
        run_steps(model, optimizer, rows[:2])
        with nullcontext() if around else theirs() as inner:
            run_steps(model, optimizer, rows[2:4])
        run_steps(model, optimizer, rows[4:])
        assert_recorded(tracer)
    assert_same(state_of(model), expected)
    profiler = outer if around else inner
    if theirs is users_profiler:
        assert any(event.key == "aten::linear" for event in profiler.key_averages()), "their profile is whole"


def test_compiled_model(tmp_path: Path) -> None:
    """A model under torch.compile ends with the same bits as the compiled one without memtrace."""

    def run(traced: bool) -> list[torch.Tensor]:
        torch.compiler.reset()
        model, optimizer = make()
        compiled = torch.compile(model, backend="aot_eager")
        with tracer_of(compiled, optimizer, tmp_path) if traced else nullcontext() as tracer:
            run_steps(compiled, optimizer, batches(STEPS))
            if traced:
                assert_recorded(tracer)
        return state_of(model)

    assert_same(run(traced=True), run(traced=False))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(tmp_path: Path, context: str) -> None:
    """Workers that inherit the process, or start anew, neither hold the port nor write the log."""

    def run(traced: bool) -> list[torch.Tensor]:
        model, optimizer = make()
        loader = DataLoader(
            TensorDataset(torch.stack(batches(STEPS))),
            batch_size=1,
            num_workers=2,
            multiprocessing_context=context,
            persistent_workers=True,
        )
        with tracer_of(model, optimizer, tmp_path) if traced else nullcontext() as tracer:
            run_steps(model, optimizer, [batch[0] for (batch,) in loader])
            if traced:
                assert_recorded(tracer)
                port = int(tracer.url.rpartition(":")[2].partition("/")[0])
                tracer.detach()
                with socket.create_server(("127.0.0.1", port)):  # free, although the workers are alive
                    pass
        return state_of(model)

    assert_same(run(traced=True), run(traced=False))
    assert len(list(read_step_log(tmp_path / "steps-rank0.jsonl"))) == STEPS


def test_model_is_copied_and_pickled(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    """A copy trains by itself, as an average of weights does, and the whole model can be saved; neither is watched."""
    model, optimizer = make()
    with tracer_of(model, optimizer, tmp_path) as tracer:
        for row in batches(STEPS):
            other = copy.deepcopy(model)
            saved = io.BytesIO()
            torch.save(model, saved)
            saved.seek(0)
            for aside in (other, torch.load(saved, weights_only=False)):
                run_steps(aside, torch.optim.AdamW(aside.parameters()), [row])
            run_steps(model, optimizer, [row])
        assert_recorded(tracer)
    assert_same(state_of(model), expected)


def test_attached_twice(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    """A second attach changes nothing: each step is recorded once."""
    model, optimizer = make()
    with tracer_of(model, optimizer, tmp_path) as tracer:
        tracer.attach()
        run_steps(model, optimizer, batches(STEPS))
        assert_recorded(tracer)
    assert_same(state_of(model), expected)
    assert len(list(read_step_log(tmp_path / "steps-rank0.jsonl"))) == STEPS


def test_two_tracers_at_once(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    """Two tracers on one model both record every step; where both want to trace, one gives way to the other."""
    model, optimizer = make()
    first = tracer_of(model, optimizer, tmp_path / "first")
    second = tracer_of(model, optimizer, tmp_path / "second")
    with first, second:
        run_steps(model, optimizer, batches(STEPS))
        assert_recorded(first)
        assert_recorded(second)
        assert first.url != second.url
    assert_same(state_of(model), expected)


def test_scraper_that_never_reads(tmp_path: Path, expected: list[torch.Tensor]) -> None:
    """Connections that ask and never take the answer hold up neither training nor the end of it."""
    model, optimizer = make()
    with ExitStack() as stack:
        tracer = stack.enter_context(tracer_of(model, optimizer, tmp_path))
        port = int(tracer.url.rpartition(":")[2].partition("/")[0])
        for _ in range(4):
            scraper = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            scraper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            scraper.sendall(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n" * 200)
        run_steps(model, optimizer, batches(STEPS))
        assert_recorded(tracer)
        tracer.detach()
    assert_same(state_of(model), expected)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """The final state of a Trainer without the callback."""
    trainer = make_trainer(tmp_path_factory.mktemp("bare"), model=make_model())
    trainer.train()
    return state_of(trainer.model)


def test_callback_given_twice(tmp_path: Path, bare: list[torch.Tensor]) -> None:
    """The same callback, listed twice, has one tracer."""
    callback = MemTraceCallback(port=0)
    trainer = make_trainer(tmp_path, callback, callback, model=make_model())
    trainer.train()
    assert_same(state_of(trainer.model), bare)
    assert callback.tracer.snapshot().up
    assert callback.tracer.snapshot().totals.steps == 6
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("memtrace")]


def test_trained_twice(tmp_path: Path) -> None:
    """A second train() of the same Trainer is a second run."""

    def run(*callbacks: MemTraceCallback) -> list[torch.Tensor]:
        trainer = make_trainer(tmp_path, *callbacks, model=make_model())
        trainer.train()
        trainer.train()
        return state_of(trainer.model)

    callback = MemTraceCallback(port=0)
    assert_same(run(callback), run())
    assert callback.tracer.snapshot().totals.steps == 6


def test_resumed_from_a_checkpoint(tmp_path: Path, bare: list[torch.Tensor]) -> None:
    """A run that was cut off and resumed ends as one that was not, and counts its steps as Trainer does."""
    checkpoints = {"save_strategy": "steps", "save_steps": 3}
    first = make_trainer(tmp_path, MemTraceCallback(port=0), model=make_model(), **checkpoints)
    first.train()
    callback = MemTraceCallback(port=0)
    resumed = make_trainer(tmp_path, callback, model=make_model(), **checkpoints)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert_same(state_of(resumed.model), bare)
    assert [record.step for record in callback.tracer.history] == [4, 5, 6]


@pytest.mark.gpu
def test_users_memory_history_is_active(tmp_path: Path) -> None:
    """A history that the user records on the GPU is read, never stopped or cleared."""

    def run(traced: bool) -> list[torch.Tensor]:
        model, optimizer = make()
        model.cuda()
        rows = [row.cuda() for row in batches(STEPS)]
        with tracer_of(model, optimizer, tmp_path) if traced else nullcontext() as tracer:
            run_steps(model, optimizer, rows)
            if traced:
                assert_recorded(tracer)
        return state_of(model)

    torch.cuda.reset_accumulated_memory_stats()  # so that the history is known to be short
    torch.cuda.memory._record_memory_history(context=None, max_entries=100_000)
    try:
        marker = torch.empty(12345 * 512, dtype=torch.uint8, device="cuda")
        del marker
        assert_same(run(traced=True), run(traced=False))
        history = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        assert any(entry["size"] == 12345 * 512 for entry in history)
        assert torch._C._cuda_isHistoryEnabled()
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
