"""The lengths of a training dataset, where they can be had without reading it.

Two kinds tell them for nearly nothing: a table of `datasets` (from the offsets of its token lists, or a column of
lengths) and a list of samples that are in memory already. Any other dataset makes its samples when it is asked for
them; it is not asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from memtrace.record.risk_reading import LargestBatch, ShapeSource

TOKENS = "input_ids"
LENGTH = "length"
MAX_SAMPLES = 200_000
"""Samples of a list that are looked at, a few milliseconds' worth; a longer list is not."""


def largest_batch(dataset: object, batch_size: int) -> LargestBatch | None:
    """Returns the micro batch of the longest samples of a dataset, all padded to the longest.

    Args:
        dataset: what the run trains on.
        batch_size: samples of one micro batch.

    Returns:
        The batch; None where the dataset does not tell lengths cheaply.

    Raises:
        Exception: whatever the dataset's own code raises.
    """
    longest = _longest_of_table(dataset) if hasattr(dataset, "column_names") else _longest_of_list(dataset)
    if longest is None or longest <= 0:
        return None
    return LargestBatch(tokens=longest * batch_size, positions=longest, source=ShapeSource.DATASET)


def _longest_of_table(dataset: Any) -> int | None:
    """Returns the longest row of the Arrow table behind a `datasets.Dataset`, also of rows that were selected out."""
    table = getattr(dataset, "data", None)
    names = dataset.column_names
    if table is None or not isinstance(names, list):  # a stream, or several splits
        return None
    if LENGTH in names:
        lengths = [chunk.drop_null().to_numpy(zero_copy_only=False) for chunk in table.column(LENGTH).chunks]
        if all(array.dtype.kind in "iu" for array in lengths):  # a user's own column may be anything
            return _highest(lengths)
    if TOKENS not in names or not all(hasattr(chunk, "offsets") for chunk in table.column(TOKENS).chunks):
        return None
    offsets = (chunk.offsets.to_numpy() for chunk in table.column(TOKENS).chunks)
    return _highest(offset[1:] - offset[:-1] for offset in offsets)


def _highest(arrays: Iterable[Any]) -> int | None:
    return max((int(array.max()) for array in arrays if array.size), default=None)


def _longest_of_list(dataset: object) -> int | None:
    if not isinstance(dataset, (list, tuple)) or not 0 < len(dataset) <= MAX_SAMPLES:
        return None
    tokens = [sample.get(TOKENS) if isinstance(sample, Mapping) else None for sample in dataset]
    if not all(hasattr(found, "__len__") for found in tokens):
        return None
    return max(len(found) for found in tokens if found is not None)
