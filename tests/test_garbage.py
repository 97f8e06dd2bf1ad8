"""The garbage collector is off inside the block, and afterwards as it was."""

import gc
from collections.abc import Iterator

import pytest

from memtrace.garbage import uncollected


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
