"""The ledger: each storage once, whoever shares it, for as long as it lives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from memtrace.attribution.ledger import PRECEDENCE, Ledger
from memtrace.attribution.models.contents import claim_model
from memtrace.record.categories import Category
from memtrace.sources.events import Tag

CPU = torch.device("cpu")
FLOAT = 4


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(CPU)


def bytes_of(ledger: Ledger) -> dict[str, int]:
    return {"/".join(tag): size for tag, size in ledger.totals().items()}


class TestSharing:
    """One storage, many tensors."""

    def test_tied_weights(self, ledger: Ledger) -> None:
        """An output matrix tied to the embedding counts once."""
        model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
        model[1].weight = model[0].weight
        claim_model(model, ledger)
        assert bytes_of(ledger) == {"weights/trainable/float32": 40 * FLOAT}

    def test_weights_tied_through_data(self, ledger: Ledger) -> None:
        """Two parameters over one storage, as some checkpoints load them."""
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        model[1].weight = nn.Parameter(model[0].weight.data)
        assert model[1].weight is not model[0].weight
        claim_model(model, ledger)
        assert bytes_of(ledger) == {"weights/trainable/float32": 16 * FLOAT}

    def test_views_of_a_flat_buffer(self, ledger: Ledger) -> None:
        """Parameters that are views: the buffer counts once, with the padding that no parameter covers."""
        flat = torch.zeros(100)
        for view in (flat[:40], flat[40:90]):
            ledger.claim(nn.Parameter(view), Category.WEIGHTS, "trainable")
        assert bytes_of(ledger) == {"weights/trainable/float32": 100 * FLOAT}

    def test_a_view_counts_its_whole_storage(self, ledger: Ledger) -> None:
        """One row of a batch keeps the whole batch alive."""
        row = torch.zeros(8, 8)[0]
        ledger.claim(row, Category.INPUTS)
        assert bytes_of(ledger) == {"inputs//float32": 64 * FLOAT}

    def test_an_expanded_tensor_counts_what_it_takes(self, ledger: Ledger) -> None:
        """Not its elements."""
        mask = torch.zeros(1, 8).expand(1000, 8)
        ledger.claim(mask, Category.INPUTS)
        assert bytes_of(ledger) == {"inputs//float32": 8 * FLOAT}

    def test_a_sparse_tensor_counts_its_parts(self, ledger: Ledger) -> None:
        """Indices and values, each with its element type; coalesced or not."""
        sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]]), torch.ones(3), (5,), check_invariants=True)
        ledger.claim(sparse, Category.GRADIENTS)
        assert bytes_of(ledger) == {"gradients//int64": 24, "gradients//float32": 12}

    @pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
    def test_compressed_rows_count_their_parts(self, ledger: Ledger) -> None:
        """Row pointers, column indices and values."""
        pointers, columns = torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1])
        rows = torch.sparse_csr_tensor(pointers, columns, torch.ones(3), check_invariants=True)
        ledger.claim(rows, Category.WEIGHTS)
        assert bytes_of(ledger) == {"weights//int64": (3 + 3) * 8, "weights//float32": 12}

    def test_a_wrapper_counts_what_it_wraps(self, ledger: Ledger) -> None:
        """A tensor subclass without storage of its own: the tensors in it, with their own element types."""
        values, scales = torch.zeros(8, dtype=torch.int8), torch.zeros(8, dtype=torch.int8)
        ledger.claim(TwoTensor(values, scales), Category.WEIGHTS, "frozen")
        assert bytes_of(ledger) == {"weights/frozen/int8": 16}

    def test_empty_storages_and_other_devices_are_passed_over(self, ledger: Ledger) -> None:
        """A ledger keeps one device."""
        ledger.claim(torch.zeros(0), Category.WEIGHTS)
        ledger.claim(torch.zeros(8, device="meta"), Category.WEIGHTS)
        assert len(ledger) == 0


class TestPrecedence:
    """One storage, many roles."""

    @pytest.mark.parametrize("weaker", list(PRECEDENCE)[1:])
    def test_the_stronger_role_wins_in_either_order(self, weaker: Category) -> None:
        """A weight stays a weight, whatever else it is used for."""
        for roles in ((Category.WEIGHTS, weaker), (weaker, Category.WEIGHTS)):
            ledger, tensor = Ledger(CPU), torch.zeros(2)
            for role in roles:
                ledger.claim(tensor, role)
            assert ledger.role_of(tensor) is Category.WEIGHTS

    def test_every_category_has_its_rank(self) -> None:
        """A new category must be placed among the roles."""
        assert set(PRECEDENCE) == set(Category)

    def test_of_equal_roles_the_last_one_counts(self, ledger: Ledger) -> None:
        """A parameter that is frozen now is frozen."""
        parameter = nn.Parameter(torch.zeros(2))
        ledger.claim(parameter, Category.WEIGHTS, "trainable")
        ledger.claim(parameter, Category.WEIGHTS, "frozen")
        assert bytes_of(ledger) == {"weights/frozen/float32": 8}

    def test_what_nobody_has_claimed_has_no_role(self, ledger: Ledger) -> None:
        """Unknown is None."""
        assert ledger.role_of(torch.zeros(2)) is None


class TestLife:
    """Storages that come and go."""

    def test_the_ledger_keeps_nothing_alive(self, ledger: Ledger) -> None:
        """Neither the tensor nor its storage."""
        tensor = torch.zeros(2)
        alive = weakref.ref(tensor)
        ledger.claim(tensor, Category.INPUTS)
        del tensor
        assert alive() is None
        assert len(ledger) == 0
        assert ledger.live() == []

    def test_a_storage_lives_as_long_as_any_tensor_on_it(self, ledger: Ledger) -> None:
        """The tensor that was claimed may go before a view of it."""
        tensor = torch.zeros(4)
        view = tensor[:1]
        ledger.claim(tensor, Category.INPUTS)
        del tensor
        gc.collect()
        assert bytes_of(ledger) == {"inputs//float32": 4 * FLOAT}
        del view
        assert len(ledger) == 0

    def test_a_storage_held_by_autograd_alone_lives(self, ledger: Ledger) -> None:
        """Saved for backward, no Python tensor left."""
        weight = nn.Parameter(torch.ones(3))
        batch = torch.ones(3)
        ledger.claim(batch, Category.INPUTS)
        loss = (weight * batch).sum()
        del batch
        gc.collect()
        assert len(ledger) == 1
        loss.backward()
        del loss
        assert len(ledger) == 0

    def test_live_tells_addresses_and_sizes_of_now(self, ledger: Ledger) -> None:
        """A storage that was given memory elsewhere is where it is now."""
        tensor = torch.zeros(4)
        ledger.claim(tensor, Category.WEIGHTS, "trainable")
        tensor.untyped_storage().resize_(1 << 20)
        (known,) = ledger.live()
        assert (known.address, known.nbytes) == (tensor.untyped_storage().data_ptr(), 1 << 20)
        assert known.tag == Tag(Category.WEIGHTS, "trainable", "float32")

    def test_a_storage_resized_to_nothing_is_not_live(self, ledger: Ledger) -> None:
        """Engines free gathered weights in this way: it is known still, and comes back."""
        tensor = torch.zeros(4)
        ledger.claim(tensor, Category.WEIGHTS)
        tensor.untyped_storage().resize_(0)
        assert ledger.live() == []
        tensor.untyped_storage().resize_(16)
        assert [known.nbytes for known in ledger.live()] == [16]

    def test_clear_forgets_all_but_one_category(self, ledger: Ledger) -> None:
        """And a forgotten storage leaves no note when it dies."""
        batch, weight = torch.zeros(2), torch.zeros(3)
        ledger.claim(batch, Category.INPUTS)
        ledger.claim(weight, Category.WEIGHTS)
        ledger.clear(keep=Category.INPUTS)
        ledger.begin_journal()
        assert bytes_of(ledger) == {"inputs//float32": 8}
        del weight
        assert ledger.end_journal() == []

    def test_a_ledger_that_is_gone_is_not_called(self) -> None:
        """Storages outlive tracers."""
        tensor, ledger = torch.zeros(2), Ledger(CPU)
        ledger.claim(tensor, Category.INPUTS)
        alive = weakref.ref(ledger)
        del ledger
        assert alive() is None
        del tensor


class TestJournal:
    """What the replay is told."""

    def test_claims_and_deaths_in_their_order(self, ledger: Ledger) -> None:
        """Each with its address; a death has no tag."""
        ledger.begin_journal()
        tensor = torch.zeros(2)
        address = tensor.untyped_storage().data_ptr()
        ledger.claim(tensor, Category.INPUTS)
        ledger.claim(tensor, Category.GRADIENTS)
        del tensor
        notes = ledger.end_journal()
        assert [(note.address, note.nbytes) for note in notes] == [(address, 8)] * 3
        assert [note.tag and note.tag.category for note in notes] == [Category.INPUTS, Category.GRADIENTS, None]
        assert notes == sorted(notes, key=lambda note: note.time_ns)

    def test_a_claim_notes_the_role_that_the_storage_has(self, ledger: Ledger) -> None:
        """Not the weaker one that was claimed."""
        weight = torch.zeros(2)
        ledger.claim(weight, Category.WEIGHTS)
        ledger.begin_journal()
        ledger.claim(weight, Category.INPUTS)
        (note,) = ledger.end_journal()
        assert note.tag == Tag(Category.WEIGHTS, "", "float32")

    def test_only_while_it_is_kept(self, ledger: Ledger) -> None:
        """Before and after, nothing is noted; ending twice gives nothing."""
        tensor = torch.zeros(2)
        ledger.claim(tensor, Category.INPUTS)
        ledger.begin_journal()
        assert ledger.end_journal() == []
        ledger.claim(tensor, Category.INPUTS)
        assert ledger.end_journal() == []
