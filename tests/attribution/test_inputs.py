"""The batch: its tensors, and the shape that activations follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memtrace.attribution.inputs import batch_tensors, claim_batch, count_tokens, main_input, shape_of
from memtrace.attribution.ledger import Ledger
from memtrace.record.categories import Category


def test_tensors_in_nested_arguments() -> None:
    """In sequences and mappings, in order; what is no tensor is skipped."""
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [t.numel() for t in batch_tensors(([a, "text"], {"x": (b, None), "y": {"z": c}}, 7))] == [1, 2, 3]


class Unreadable(dict[str, Any]):
    def values(self) -> Any:
        raise ConnectionError("the samples are elsewhere")


class Halfway(list[Any]):
    def __iter__(self) -> Any:
        yield torch.zeros(1)
        raise StopAsyncIteration


def test_a_container_that_cannot_be_gone_through_is_unknown() -> None:
    """Whatever it raises, and however far it came; what lies beside it is found."""
    batch = (Unreadable(x=torch.zeros(1)), [Halfway([1]), torch.zeros(7)], {"y": torch.zeros(8)})
    assert [tensor.numel() for tensor in batch_tensors(batch)] == [7, 8]


def test_all_of_them_are_inputs() -> None:
    """By position and by name; a tensor that is given twice counts once, and a weight stays a weight."""
    ledger = Ledger(torch.device("cpu"))
    ids, mask, weight = torch.zeros(4, dtype=torch.long), torch.zeros(4), torch.zeros(2)
    ledger.claim(weight, Category.WEIGHTS)
    claim_batch((ids,), {"mask": mask, "labels": ids, "prompt": [weight]}, ledger)
    assert {"/".join(tag): size for tag, size in ledger.totals().items()} == {
        "inputs//int64": 32,
        "inputs//float32": 16,
        "weights//float32": 8,
    }


@pytest.mark.parametrize(
    ("args", "kwargs", "name", "expected"),
    [
        ((torch.zeros(1),), {"input_ids": torch.zeros(2)}, "input_ids", 2),
        ((torch.zeros(1),), {"other": torch.zeros(2)}, "input_ids", 1),
        ((), {"input_ids": None, "inputs_embeds": torch.zeros(3)}, "input_ids", 3),
        ((), {"x": [torch.zeros(4)]}, None, 4),
        ((), {}, "input_ids", None),
    ],
)
def test_the_tensor_that_gives_the_batch_its_shape(args: Any, kwargs: Any, name: str | None, expected: Any) -> None:
    """The one that the model names, else the first; None where there is none."""
    found = main_input(args, kwargs, name)
    assert (None if found is None else found.numel()) == expected


@pytest.mark.parametrize(
    ("shape", "dtype", "tokens"),
    [
        ((8, 512), torch.int64, 4096),
        ((2, 3, 4), torch.int64, 24),
        ((8, 16000), torch.float32, 128000),
        ((8, 512, 768), torch.bfloat16, 4096),
        ((8, 3, 224, 224), torch.float32, 8),
        ((8, 3, 16, 224, 224), torch.float32, 8),
        ((8,), torch.float32, 8),
    ],
    ids=["ids", "choices", "waveforms", "embeddings", "images", "videos", "rows"],
)
def test_tokens(shape: tuple[int, ...], dtype: torch.dtype, tokens: int) -> None:
    """What the size of the activations is proportional to."""
    assert count_tokens(torch.zeros(shape, dtype=dtype, device="meta")) == tokens


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize(("dtype", "rest", "tokens"), [(torch.float32, (4,), 5), (torch.int64, (), 5)])
def test_a_nested_batch_is_one_packed_sequence(
    layout: torch.layout, dtype: torch.dtype, rest: tuple[int, ...], tokens: int
) -> None:
    """It has no shape of its own."""
    rows = [torch.ones((length, *rest), dtype=dtype) for length in (2, 3)]
    batch = torch.nested.nested_tensor(rows, layout=layout)
    assert shape_of(batch) == (1, 5, *rest)
    assert count_tokens(batch) == tokens
