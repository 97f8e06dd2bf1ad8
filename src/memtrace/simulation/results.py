"""What an operator returns, described by layouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memtrace.simulation.tensor import Layout

Operator = torch._ops.OpOverload


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor on a storage of its own."""

    layout: Layout
    nbytes: int
    """Size of the storage."""
    offset: int = 0
    """Elements from the beginning of the storage."""


@dataclass(frozen=True, slots=True)
class ViewOf:
    """A tensor on the storage of an input, or of an output before it."""

    position: int
    """Counts the tensors among the arguments, then the tensors that are returned."""
    layout: Layout
    offset: int
    """Elements, of the view's own type, from where the other tensor begins."""


@dataclass(frozen=True, slots=True)
class Same:
    """A tensor among the arguments, or an output before it, itself: a second owner, which autograd copies for."""

    position: int
    """Counts as `ViewOf` does."""


@dataclass(frozen=True, slots=True)
class Several:
    """A list or tuple of results."""

    kind: type
    items: tuple[Result, ...]


@dataclass(frozen=True, slots=True)
class Constant:
    """Something that is no tensor."""

    value: object


Result = NewTensor | ViewOf | Same | Several | Constant
