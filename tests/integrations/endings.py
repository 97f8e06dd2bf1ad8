"""Real Trainers, each in a process of its own, that a test tells how to end: `python endings.py`.

Each line of the input is a command, each line of the output its answer, in JSON. `start` forks a child, which trains up
to where it waits; `ready` answers with the address of its metrics once it is there; `go` lets it go on to its end;
`signal` sends it one; `wait` answers with its exit code. The children are forked before torch has done anything, so
that it is loaded once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from greedy_training import GreedyModel
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from memtrace import MemTraceCallback

STEPS = 4
"""The child waits before the last one."""
HELD = 2**31
"""Bytes of a parameter that nobody writes to, so that they cost no memory: beside them the process is small."""
NEAR = 0.925
"""Share of its capacity that a run near its limit takes, give or take what the process grows by."""


class Model(GreedyModel):
    """Says its loss as Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Parameter(torch.empty(HELD // 4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"loss": super().forward(x)}


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random rows."""

    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(32)}


class Hold(TrainerCallback):
    """Waits for the test before a step."""

    def __init__(self, before_step: int, wait: Callable[[], None]) -> None:
        self._before, self._wait = before_step, wait

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self._before:
            self._wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """What the parent has of a child."""

    pid: int
    ready: int
    go: int


def train(directory: Path, pipes: tuple[int, int], *, run_name: str, port: int, end: str, near: bool) -> None:
    """Trains until the test says more, and then ends as it was told.

    Args:
        directory: the output directory.
        pipes: what the address is written to, and what is waited for.
        run_name: name of the run.
        port: the wanted port.
        end: `well`, out of memory in `forward` or `backward`, or `hangs` before the first step.
        near: whether the run is near its limit.
    """
    ready, go = pipes
    model = Model()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows())  # imports all trackers that there are
    limit = psutil.Process().memory_info().rss + round(HELD * (1 / NEAR - 1)) if near else None
    callback = MemTraceCallback(
        port=port,
        run_name=run_name,
        trace_every=1,
        device_limit_bytes=limit,
        strict=True,
        linger_seconds=600.0,
        textfile_dir=directory / "text",
    )

    def wait() -> None:
        assert callback.tracer is not None
        os.write(ready, str(callback.tracer.url).encode())
        os.read(go, 1)
        model.greedy.fails_in = end if end in ("forward", "backward") else None

    hold = Hold(1 if end == "hangs" else STEPS, wait)
    trainer.add_callback(callback)
    trainer.add_callback(hold)
    trainer.train()


def start(directory: Path) -> Child | tuple[int, int]:
    """Forks a child; returns what the parent has of it, and in the child its own ends of the pipes."""
    (reading, ready), (go, writing) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        os.close(ready)
        os.close(go)
        return Child(pid=pid, ready=reading, go=writing)
    directory.mkdir(exist_ok=True)
    with (directory / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    return ready, go


def main() -> None:
    children: dict[str, Child] = {}
    try:
        for line in iter(sys.stdin.readline, ""):
            command = json.loads(line)
            what, name = command.pop("do"), command.pop("name")
            answer: Any = None
            if what == "start":
                directory = Path(command.pop("directory"))
                child = start(directory)
                if not isinstance(child, Child):
                    children.clear()  # they are the parent's
                    return train(directory, child, **command)
                children[name] = child
            elif what == "ready":
                answer = os.read(children[name].ready, 1000).decode()
            elif what == "go":
                os.write(children[name].go, b".")
            elif what == "signal":
                os.kill(children[name].pid, command["number"])
            elif what == "wait":
                answer = os.waitstatus_to_exitcode(os.waitpid(children.pop(name).pid, 0)[1])
            print(json.dumps(answer), flush=True)
    finally:
        for child in children.values():
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)


if __name__ == "__main__":
    main()
