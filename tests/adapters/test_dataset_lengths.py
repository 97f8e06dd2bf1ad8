"""The lengths of training data."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch

from memtrace.adapters.dataset_lengths import MAX_SAMPLES, largest_batch
from memtrace.record.risk_reading import LargestBatch, ShapeSource

LISTS = [[1] * length for length in (3, 11, 7)]


def expected(tokens: int, positions: int) -> LargestBatch:
    return LargestBatch(tokens=tokens, positions=positions, source=ShapeSource.DATASET)


def test_token_lists_of_a_table() -> None:
    """A table of `datasets` tells the longest of its token lists, over all of its chunks."""
    parts = [datasets.Dataset.from_dict({"input_ids": LISTS}), datasets.Dataset.from_dict({"input_ids": [[1] * 13]})]
    assert largest_batch(datasets.concatenate_datasets(parts), 4) == expected(52, 13)


def test_column_of_lengths_goes_first() -> None:
    """Where a table has a column of lengths, as grouping by length needs, that is taken."""
    table = datasets.Dataset.from_dict({"input_ids": LISTS, "length": [30, 40, 20]})
    assert largest_batch(table, 2) == expected(80, 40)


def test_samples_in_memory() -> None:
    """A list of samples is looked through, with lists or tensors of tokens."""
    samples = [{"input_ids": torch.ones(length)} for length in (3, 9)]
    assert largest_batch(samples, 2) == expected(18, 9)
    assert largest_batch([{"input_ids": tokens} for tokens in LISTS], 1) == expected(11, 11)


class Lazy(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset that makes its samples when it is asked for them."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise AssertionError("nobody may ask for a sample")


@pytest.mark.parametrize(
    "dataset",
    [
        pytest.param(Lazy(), id="made when asked for"),
        pytest.param([], id="empty list"),
        pytest.param([{"pixel_values": [1]}], id="no tokens"),
        pytest.param([{"input_ids": [1]}, {"input_ids": None}], id="a sample without tokens"),
        pytest.param([{"input_ids": [1]}] * (MAX_SAMPLES + 1), id="too long a list"),
        pytest.param(datasets.Dataset.from_dict({"text": ["a"]}), id="table of text"),
        pytest.param(datasets.Dataset.from_dict({"input_ids": []}), id="empty table"),
        pytest.param(datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), id="stream"),
        pytest.param(datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": LISTS})}), id="splits"),
    ],
)
def test_what_does_not_tell_is_not_asked(dataset: object) -> None:
    """A dataset whose lengths would cost something is left alone."""
    assert largest_batch(dataset, 2) is None
