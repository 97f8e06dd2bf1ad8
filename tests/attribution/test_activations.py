"""What is saved for the backward pass: activations, and low-precision copies of weights among them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from memtrace.attribution.activations import ActivationTags
from memtrace.record.categories import Category

CPU = torch.device("cpu")
ROWS, WIDTH = 5, 8
BF16 = 2


def tags_of(model: nn.Module, run: Callable[[], torch.Tensor]) -> ActivationTags:
    """What was noted of a forward pass."""
    tags = ActivationTags(model, CPU)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tags.pack(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert run().requires_grad
    return tags


def bytes_by_category(tags: ActivationTags) -> dict[Category, int]:
    """Each address once; where it was noted twice the stronger role, as the replay has it."""
    found = {}
    for note in tags.notes:
        assert note.tag is not None
        if found.get(note.address, (0, Category.ACTIVATIONS))[1] is Category.ACTIVATIONS:
            found[note.address] = (note.nbytes, note.tag.category)
    totals: dict[Category, int] = {}
    for nbytes, category in found.values():
        totals[category] = totals.get(category, 0) + nbytes
    return totals


def autocast(model: nn.Module, batch: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The model under autocast; the result keeps the graph alive."""

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    return run


def test_a_saved_tensor_is_an_activation() -> None:
    """Its address, its size and its element type."""
    weight = nn.Parameter(torch.ones(3))
    batch = torch.ones(3)
    tags = tags_of(nn.Identity(), lambda: weight * batch)
    noted = {note.address: note for note in tags.notes}
    note = noted[batch.untyped_storage().data_ptr()]
    assert note.nbytes == 12
    assert note.tag is not None
    assert (note.tag.category, note.tag.component, note.tag.dtype) == (Category.ACTIVATIONS, "", "float32")


def test_in_full_precision_nothing_is_transient() -> None:
    """Weights that are saved are noted as saved; the ledger knows better, and the replay follows it."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))
    assert set(bytes_by_category(tags_of(model, lambda: model(torch.ones(ROWS, WIDTH))))) == {Category.ACTIVATIONS}


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_copy_made_by_autocast_is_transient(precision: torch.dtype) -> None:
    """The matrix of the second layer: it is needed for the gradient of its input."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2))

    def run() -> torch.Tensor:
        with torch.autocast("cpu", precision):
            return model(torch.ones(ROWS, WIDTH))

    tags = tags_of(model, run)
    assert bytes_by_category(tags)[Category.TRANSIENT_WEIGHTS] == 2 * WIDTH * BF16
    components = {note.tag.component for note in tags.notes if note.tag.category is Category.TRANSIENT_WEIGHTS}
    assert components == {"autocast"}


def test_a_copy_behind_several_views_is_transient() -> None:
    """A weight that is turned, and then reshaped by the product itself."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, WIDTH))

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            copy = self.weight.to(torch.bfloat16)
            return batch @ copy.transpose(1, 2)

    model = Turned()
    batch = torch.ones(2, ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    totals = bytes_by_category(tags_of(model, lambda: model(batch)))
    assert totals[Category.TRANSIENT_WEIGHTS] == 8 * WIDTH * BF16


def test_a_cast_activation_is_an_activation() -> None:
    """It was computed, and it grows with the batch."""
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
    totals = bytes_by_category(tags_of(model, autocast(model, torch.ones(ROWS, WIDTH, requires_grad=True))))
    assert totals[Category.TRANSIENT_WEIGHTS] == WIDTH * WIDTH * BF16


def test_a_cast_input_that_wants_a_gradient_is_an_activation() -> None:
    """A leaf like a weight, but no parameter: embeddings of a frozen model are made to want gradients in this way."""
    model = nn.Linear(WIDTH, 4, bias=False)
    totals = bytes_by_category(tags_of(model, autocast(model, torch.ones(ROWS, WIDTH, requires_grad=True))))
    assert totals == {Category.TRANSIENT_WEIGHTS: 4 * WIDTH * BF16, Category.ACTIVATIONS: ROWS * WIDTH * BF16}


class TestFrozenWeights:
    """Their copies have no gradient function: they are told by their shape."""

    def frozen(self, *layers: nn.Module) -> nn.Sequential:
        """A trainable layer under frozen ones, so that gradients go through these."""
        for layer in layers:
            layer.requires_grad_(False)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers)

    def test_a_matrix(self) -> None:
        """Saved as the transposed view that the product used."""
        model = self.frozen(nn.Linear(WIDTH, 3))
        totals = bytes_by_category(tags_of(model, autocast(model, torch.ones(ROWS, WIDTH))))
        assert totals[Category.TRANSIENT_WEIGHTS] == 3 * WIDTH * BF16

    def test_a_convolution(self) -> None:
        """Saved in its own shape."""
        model = self.frozen(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 6, 3))
        totals = bytes_by_category(tags_of(model, autocast(model, torch.ones(ROWS, WIDTH))))
        assert totals[Category.TRANSIENT_WEIGHTS] == 6 * 2 * 3 * BF16

    def test_an_activation_of_the_same_size_is_none(self) -> None:
        """As many rows as the frozen layer has outputs: what tells is that a copy of a weight comes transposed."""
        model = nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, 2))
        model[0].requires_grad_(False)
        batch = torch.ones(WIDTH, WIDTH)
        totals = bytes_by_category(tags_of(model, autocast(model, batch)))
        assert totals == {Category.ACTIVATIONS: WIDTH * 3 * BF16}

    def test_a_model_that_is_frozen_in_low_precision_has_no_copies(self) -> None:
        """Its weights are used as they are: what is saved are weights, which the ledger knows."""
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)).to(torch.bfloat16)
        model[1].requires_grad_(False)
        batch = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)
        totals = bytes_by_category(tags_of(model, lambda: model(batch)))
        assert Category.TRANSIENT_WEIGHTS not in totals


def test_the_loss_is_saved_too() -> None:
    """Probabilities of a cross-entropy under autocast are full precision activations."""
    model = nn.Linear(WIDTH, 4)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(torch.ones(ROWS, WIDTH)), torch.zeros(ROWS, dtype=torch.long))

    tags = tags_of(model, run)
    probabilities = [note for note in tags.notes if note.tag and note.tag.dtype == "float32" and note.nbytes == 80]
    assert probabilities
    assert {note.tag.category for note in probabilities if note.tag} == {Category.ACTIVATIONS}
