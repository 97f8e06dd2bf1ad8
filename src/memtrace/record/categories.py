"""The vocabulary: what memory is for, when it was looked at, and in which phase it was asked for.

Everything that names a category (labels, table rows, colours, dashboards, documentation) reads it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Category(StrEnum):
    """What a block of memory is for. The order is the stacking order everywhere."""

    WEIGHTS = "weights"
    MASTER_WEIGHTS = "master_weights"
    GRADIENTS = "gradients"
    OPTIMIZER_STATE = "optimizer_state"
    ACTIVATIONS = "activations"
    TRANSIENT_WEIGHTS = "transient_weights"
    BUFFERS = "buffers"
    INPUTS = "inputs"
    COMM_BUFFERS = "comm_buffers"
    WORKSPACES = "workspaces"
    TEMPORARIES = "temporaries"
    UNATTRIBUTED = "unattributed"


class Moment(StrEnum):
    """An instant of a training step at which a breakdown is taken."""

    FORWARD_END = "forward_end"
    BACKWARD_END = "backward_end"
    STEP_END = "step_end"
    PEAK = "peak"


class Phase(StrEnum):
    """The part of a step in which a block was asked for: the component of temporaries and unattributed."""

    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    OUTSIDE = "outside"


PERSISTENT: frozenset[Category] = frozenset(
    {
        Category.WEIGHTS,
        Category.MASTER_WEIGHTS,
        Category.GRADIENTS,
        Category.OPTIMIZER_STATE,
        Category.BUFFERS,
        Category.COMM_BUFFERS,
    }
)
"""Categories whose size does not follow from the batch: the ledger knows them between traces."""

DESCRIPTIONS: Mapping[Category, str] = MappingProxyType(
    {
        Category.WEIGHTS: "Parameters that the forward pass reads.",
        Category.MASTER_WEIGHTS: "Higher-precision copies that the optimizer updates, in storage of their own.",
        Category.GRADIENTS: "`.grad`, main gradients, reduced gradient partitions.",
        Category.OPTIMIZER_STATE: "What the optimizer keeps for each parameter, by name of the state.",
        Category.ACTIVATIONS: "Tensors saved by the forward pass for the backward pass.",
        Category.TRANSIENT_WEIGHTS: "Short-lived copies of weights: autocast casts, all-gathered shards.",
        Category.BUFFERS: "Module buffers, such as the running statistics of BatchNorm.",
        Category.INPUTS: "The batch.",
        Category.COMM_BUFFERS: "Buckets for reductions and gathers between ranks.",
        Category.WORKSPACES: "What libraries keep of the allocator's memory from their first call on.",
        Category.TEMPORARIES: "Allocated and freed within the step, saved for nothing; by phase.",
        Category.UNATTRIBUTED: "Blocks that outlive the step and that nobody claims; a leak shows here first.",
    }
)

COLOURS: Mapping[Category, str] = MappingProxyType(
    {
        Category.WEIGHTS: "#1f60c4",
        Category.MASTER_WEIGHTS: "#73a5f2",
        Category.GRADIENTS: "#8f5ad6",
        Category.OPTIMIZER_STATE: "#2ca58d",
        Category.ACTIVATIONS: "#e0752d",
        Category.TRANSIENT_WEIGHTS: "#f2b04b",
        Category.BUFFERS: "#6b8a9e",
        Category.INPUTS: "#b5cf6b",
        Category.COMM_BUFFERS: "#c15c9a",
        Category.WORKSPACES: "#4f9fa8",
        Category.TEMPORARIES: "#c9b18f",
        Category.UNATTRIBUTED: "#808791",
    }
)
"""One colour a category, in every chart. Red is left to alerts."""
