"""Trains in a child for each way in which a run ends: `python ways_to_end.py DIRECTORY`, and prints exit codes as JSON.

The children are forked before memtrace has done anything, so that torch is loaded once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import torch
from faults.fault_training import batches, make, run_steps

from memtrace import MemoryTracer, TracerConfig
from memtrace.exporters.run_directory.run_file import read_run_file

HUGE = 2**60


def begin(directory: Path, **settings: object) -> tuple[MemoryTracer, torch.nn.Module, torch.optim.Optimizer]:
    """Trains one step under a tracer that nobody detaches."""
    model, optimizer = make()
    known = {
        "port": 0,
        "log_dir": directory / "log",
        "textfile_dir": directory / "text",
        "run_name": "r",
        "quiet": True,
    }
    tracer = MemoryTracer(model, optimizer, TracerConfig.from_settings(known | {"trace_every": 2} | settings))
    tracer.attach()
    run_steps(model, optimizer, batches(1))
    return tracer, model, optimizer


def well(directory: Path) -> None:
    """Ends with the script."""
    begin(directory)


def exception(directory: Path) -> None:
    """Ends with an exception that nobody catches."""
    begin(directory)
    raise ValueError("of the script")


def oom_forward(directory: Path) -> None:
    """Runs out of memory in the forward pass, and stays for a scrape."""
    _, model, optimizer = begin(directory, linger_seconds=60.0)
    model.second.register_forward_hook(lambda *_: torch.empty(HUGE))
    run_steps(model, optimizer, batches(1))


def oom_backward(directory: Path) -> None:
    """Runs out of memory in the backward pass."""
    _, model, optimizer = begin(directory)
    model.second.register_full_backward_hook(lambda *_: torch.empty(HUGE))
    run_steps(model, optimizer, batches(1))


def wait(directory: Path) -> None:
    """Waits for a signal."""
    begin(directory)
    (directory / "ready").touch()
    while True:
        time.sleep(60)


def own_handler(directory: Path) -> None:
    """Ends by a handler of the script's own, which memtrace leaves alone."""

    def leave(*_: object) -> None:
        sys.exit(7)

    signal.signal(signal.SIGTERM, leave)
    tracer, *_ = begin(directory)
    assert signal.getsignal(signal.SIGTERM) is leave
    del tracer
    os.kill(os.getpid(), signal.SIGTERM)
    while True:
        time.sleep(60)


def leaves_with_an_error(directory: Path) -> None:
    """Leaves by `sys.exit(1)`, and nobody detaches."""
    begin(directory)
    sys.exit(1)


def leaves_after_an_oom(directory: Path) -> None:
    """Catches that memory has run out, and leaves by `sys.exit()` with a message."""
    begin(directory)
    try:
        torch.empty(HUGE)
    except RuntimeError:
        sys.exit("no memory")


def leaves_well(directory: Path) -> None:
    """Leaves by `sys.exit(0)`, after one that a framework has caught, and a step."""
    _, model, optimizer = begin(directory)
    with suppress(SystemExit):
        sys.exit(2)
    run_steps(model, optimizer, batches(1))
    sys.exit(0)


def detaches_finally(directory: Path) -> None:
    """Detaches in `finally`, for an exception that goes on."""
    tracer, *_ = begin(directory)
    try:
        torch.empty(HUGE)
    finally:
        tracer.detach()


def falls_back(directory: Path) -> None:
    """Does its whole training in an `except`, and detaches."""
    try:
        import no_such_module  # noqa: F401
    except ImportError:
        tracer, *_ = begin(directory)
        tracer.detach()


def forked_worker(directory: Path) -> None:
    """Has a child that is told to end: that is the child's end, by the signal, and not the run's."""
    begin(directory)
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(60)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def start(directory: Path, way: Callable[[Path], None]) -> int:
    """Forks a child that goes on with `way`; returns its number, in the parent only."""
    directory.mkdir(exist_ok=True)
    child = os.fork()
    if child:
        return child
    with (directory / "stderr").open("a") as file:
        os.dup2(file.fileno(), 2)
    way(directory)
    sys.exit(0)


def until_ready(directory: Path) -> None:
    while not (directory / "ready").exists():
        time.sleep(0.02)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def scrape_last(directory: Path) -> str:
    """Scrapes a run until it says that it has ended."""
    text = ""
    while 'state="running"' in text or not text:
        status = read_run_file(directory / "log" / "run-rank0.json") if (directory / "log").is_dir() else None
        if status is None or status.url is None:
            time.sleep(0.02)
            continue
        with urlopen(status.url) as answer:
            text = answer.read().decode()
    return text


def main(root: Path) -> None:
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # loads what the first one loads
    codes: dict[str, int] = {}
    ways = [well, exception, oom_backward, own_handler, forked_worker]
    ways += [leaves_with_an_error, leaves_after_an_oom, leaves_well, detaches_finally, falls_back]
    children = {way.__name__: start(root / way.__name__, way) for way in ways}
    lingering = start(root / "oom_forward", oom_forward)
    (root / "oom_forward.scrape").write_text(scrape_last(root / "oom_forward"))
    codes["oom_forward"] = ended(lingering)
    for name, number in (("sigterm", signal.SIGTERM), ("sigkill", signal.SIGKILL)):
        children[name] = start(root / name, wait)
        until_ready(root / name)
        os.kill(children[name], number)
    codes |= {name: ended(child) for name, child in children.items()}
    # Two processes of one script at once, then the script once more in the same directory.
    first = start(root / "twins", wait)
    until_ready(root / "twins")
    codes["twin"] = ended(start(root / "twins", well))
    os.kill(first, signal.SIGKILL)
    ended(first)
    codes["again"] = ended(start(root / "sigkill", well))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
