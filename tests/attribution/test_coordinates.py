"""Tags name instants and storages in the coordinates of the events that they are joined with."""

import itertools

import pytest
import torch
from torch import nn

from memtrace.attribution.activations import ActivationTags
from memtrace.attribution.ledger import Ledger
from memtrace.attribution.step_in_progress import StepInProgress
from memtrace.record.categories import Category
from memtrace.sources.events import Coordinates

CPU = torch.device("cpu")


@pytest.fixture
def counted() -> Coordinates:
    """A clock that counts its readings, and storages named by their size."""
    ticks = itertools.count(1)
    return Coordinates(now_ns=lambda: next(ticks), address_of=lambda storage: storage.nbytes())


def test_the_ledger_journals_claims_and_deaths_in_its_coordinates(counted: Coordinates) -> None:
    """A claim and the death of its storage carry the given clock's times and the given address."""
    ledger = Ledger(CPU, counted)
    ledger.begin_journal()
    tensor = torch.zeros(6)
    ledger.claim(tensor, Category.INPUTS)
    del tensor
    assert [(note.time_ns, note.address) for note in ledger.end_journal()] == [(1, 24), (2, 24)]


def test_activations_are_noted_in_the_given_coordinates(counted: Coordinates) -> None:
    """A packed tensor carries the given clock's time and the given address."""
    tags = ActivationTags(nn.Linear(2, 2), CPU, counted)
    tags.pack(torch.zeros(5))
    assert [(note.time_ns, note.address) for note in tags.notes] == [(1, 20)]


def test_a_step_is_marked_on_the_given_clock(counted: Coordinates) -> None:
    """A step begins, runs forward and ends at readings of the clock that it was given."""
    step = StepInProgress(number=1, read=lambda: None, now_ns=counted.now_ns)
    step.forward_begins(None)
    step.forward_ends()
    marks = step.ends()
    assert (marks.begin_ns, marks.forward_end_ns, marks.end_ns) == (1, 3, 4)


def test_the_default_coordinates_are_those_of_memory() -> None:
    """Without coordinates the ledger names a storage by where its data are."""
    ledger, tensor = Ledger(CPU), torch.zeros(3)
    ledger.claim(tensor, Category.INPUTS)
    assert [known.address for known in ledger.live()] == [tensor.untyped_storage().data_ptr()]
