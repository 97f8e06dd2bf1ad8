"""The garbage collector is off inside the block, and afterwards as it was; traced steps leave it nothing to do."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from small_training import make, step, traced

from memtrace.attribution import window as tracing
from memtrace.attribution.garbage import only_new_garbage, uncollected


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """Leaves the collector as it was."""
    on = gc.isenabled()
    yield
    (gc.enable if on else gc.disable)()


def test_on_again_after_the_block() -> None:
    gc.enable()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_on_again_after_a_fault_in_the_block() -> None:
    gc.enable()
    with pytest.raises(ZeroDivisionError), uncollected():
        _ = 1 / 0
    assert gc.isenabled()


def test_off_stays_off() -> None:
    """Who collects by hand between steps, as training of many ranks does, has it off."""
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_what_is_there_is_left_out_of_collections_in_the_block() -> None:
    """And is in them again afterwards; what somebody had frozen before stays so, and nothing is frozen beside it."""
    there: list[object] = []
    gc.unfreeze()
    try:
        with only_new_garbage():
            assert not _collected(there)
        assert _collected(there)
    finally:
        gc.freeze()
    since: list[object] = []
    with only_new_garbage():
        assert not _collected(there)
        assert _collected(since)
    assert not _collected(there)
    assert _collected(since)


def _collected(one: object) -> bool:
    """Whether a collection would look at the object; counts of frozen ones fall as other threads let theirs go."""
    return any(other is one for other in gc.get_objects())


def test_off_while_a_step_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And on between the steps."""
    gc.enable()
    replay, states = tracing.replay, []

    def watched(*args: Any) -> Any:
        states.append(gc.isenabled())
        return replay(*args)

    monkeypatch.setattr(tracing, "replay", watched)
    model, optimizer = make()
    with traced(model, optimizer):
        for _ in range(2):
            step(model, optimizer)
            assert gc.isenabled()
    assert states == [False, False]


STEPS_AND_COLLECTIONS = """
import gc

from small_training import make, step, traced

model, optimizer = make()
with traced(model, optimizer):
    for _ in range(2):
        step(model, optimizer)
    gc.disable()
    gc.collect()
    for _ in range(2):
        step(model, optimizer)
    print(gc.collect())
"""


def test_traced_steps_leave_no_cycles() -> None:
    """What they make is gone when they end, without the collector: it would have to look at all of the training.

    In a process of its own: what other tests have left in this one becomes garbage whenever it does.
    """
    child = subprocess.run(
        [sys.executable, "-c", STEPS_AND_COLLECTIONS],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
    )
    assert child.stdout == "0\n", child.stderr
