"""The relay of failures: the allocator's observer and the hook of uncaught exceptions."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from memtrace.sources import recording_torch_private
from memtrace.sources.failures import FailureRelay


class Subscriber:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.allocations: list[tuple[int, int, int]] = []
        self.crashes: list[BaseException] = []
        self.exits: list[BaseException] = []

    def allocation_failed(self, device: int, requested: int, free: int) -> None:
        self.allocations.append((device, requested, free))

    def crashed(self, error: BaseException) -> None:
        self.crashes.append(error)

    def leaves(self, error: BaseException) -> None:
        self.exits.append(error)

    def subscribe(self, relay: FailureRelay, *, cuda: bool = False) -> Callable[[], None]:
        return relay.subscribe(self.allocation_failed, self.crashed, cuda=cuda, on_exit=self.leaves)


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException]]:
    """What the hook that was there before has been called with."""
    seen: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: seen.append(error))
    yield seen


def crash(error: BaseException) -> None:
    sys.excepthook(type(error), error, None)


def test_hook_is_chained_and_comes_off_again(printed: list[BaseException]) -> None:
    """Uncaught exceptions are told and then printed as ever; without subscribers the hook is as it was."""
    before = sys.excepthook
    relay, subscriber, error = FailureRelay(), Subscriber(), ValueError()
    stop = subscriber.subscribe(relay)
    crash(error)
    assert subscriber.crashes == printed == [error]
    stop()
    assert sys.excepthook is before


def test_hook_of_somebody_else_over_ours_stays(printed: list[BaseException]) -> None:
    """A hook that was chained over ours is not taken off, and goes on to what was there before."""
    relay, subscriber, error = FailureRelay(), Subscriber(), ValueError()
    stop = subscriber.subscribe(relay)
    ours, theirs = sys.excepthook, []

    def hook(kind, raised, trace) -> None:
        theirs.append(raised)
        ours(kind, raised, trace)

    sys.excepthook = hook
    stop()
    assert sys.excepthook is hook
    again = Subscriber()
    stop_again = again.subscribe(relay)
    crash(error)
    assert set(again.crashes) == {error}
    assert subscriber.crashes == []
    assert theirs == [error]
    assert printed == [error]
    stop_again()
    assert sys.excepthook is hook


def test_subscriber_that_is_gone_is_forgotten(printed: list[BaseException]) -> None:
    """The relay keeps nobody alive, and its hook goes with the last one."""
    before = sys.excepthook
    relay = FailureRelay()
    Subscriber().subscribe(relay)
    gc.collect()
    crash(ValueError())
    assert len(printed) == 1
    Subscriber().subscribe(relay)()
    assert sys.excepthook is before


def test_only_an_end_with_an_error_is_told(printed: list[BaseException]) -> None:
    """`sys.exit()` raises as ever, on any thread; what has a status that is no error, or ends a thread, is not told."""
    before, relay, subscriber = sys.exit, FailureRelay(), Subscriber()
    stop = subscriber.subscribe(relay)
    for status in ((), (None,), (0,), (3,), ("why",)):
        with pytest.raises(SystemExit) as left:
            sys.exit(*status)
        assert left.value.code == (status[0] if status else None)
    with ThreadPoolExecutor() as threads:
        assert isinstance(threads.submit(sys.exit, 4).exception(), SystemExit)
    error = ValueError()
    with pytest.raises(SystemExit):
        try:
            raise error
        except ValueError:
            sys.exit(5)
    assert [leaving.code for leaving in subscriber.exits] == [3, "why", 5]
    assert [leaving.__context__ for leaving in subscriber.exits] == [None, None, error]
    assert subscriber.crashes == printed == []
    stop()
    assert sys.exit is before


def test_forked_child_is_told_nothing(printed: list[BaseException]) -> None:
    """A DataLoader worker that fails is no failure of the training process; a tracer of its own is told."""
    relay, subscriber = FailureRelay(), Subscriber()
    stop = subscriber.subscribe(relay)
    child = os.fork()
    if child == 0:
        crash(ValueError())
        own = Subscriber()
        own.subscribe(relay)
        crash(ValueError())
        os._exit(0 if not subscriber.crashes and len(own.crashes) == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0
    stop()


def test_observer_is_attached_once_and_tells_all(printed: list[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's observer cannot be taken off: there is one, whoever comes and goes."""
    attached: list[Callable[[int, int, int, int], None]] = []
    monkeypatch.setattr(
        recording_torch_private, "attach_oom_observer", lambda observer: attached.append(observer) or True
    )
    relay, first, second = FailureRelay(), Subscriber(), Subscriber()
    stop_first, stop_second = first.subscribe(relay, cuda=True), second.subscribe(relay, cuda=True)
    attached[0](1, 512, 1000, 100)
    stop_first()
    attached[0](0, 1024, 1000, 50)
    stop_second()
    attached[0](0, 2048, 1000, 25)
    assert first.allocations == [(1, 512, 100)]
    assert second.allocations == [(1, 512, 100), (0, 1024, 50)]
    first.subscribe(relay, cuda=True)()
    assert len(attached) == 1


def test_build_without_cuda_has_no_observer() -> None:
    """On a CPU build the call is missing: the relay does without it."""
    import torch

    if torch.version.cuda is None:
        assert recording_torch_private.attach_oom_observer(lambda *_: None) is False
    else:
        assert hasattr(torch._C, "_cuda_attach_out_of_memory_observer")
