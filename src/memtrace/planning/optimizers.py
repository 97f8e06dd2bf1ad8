"""What optimizers keep for each parameter, by the names that their state dicts give it.

Counted are tensors that grow with the parameters. Step counts and other scalars (4 bytes for each parameter tensor)
are not. The layouts of torch.optim are tests: each is compared with the state of the real optimizer after a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

from memtrace.planning.lookup import by_name

MATRIX_SIDE = 4096
"""Rows and columns of the square matrices that factored states are counted for: Llama-3-8B's hidden size."""

BLOCK_SIZE_8BIT = 256
"""Elements that share one float32 scale. Source: bitsandbytes, optim/optimizer.py, `blocksize = 256`."""

LBFGS_HISTORY = 100
"""Steps that torch.optim.LBFGS remembers by default (`history_size`)."""

_FACTOR = Fraction(1, MATRIX_SIDE)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One tensor of an optimizer's state."""

    component: str
    """Its name in the state dict."""
    elements: Fraction = Fraction(1)
    """Elements for each parameter."""
    dtype: str | None = None
    """Its type; None where it has the type of the tensor that the optimizer updates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerLayout:
    """What one optimizer keeps, and what its step allocates."""

    name: str
    source: str
    """The class whose state this is."""
    states: tuple[State, ...] = ()
    foreach_copies: int = 0
    """Temporaries of the step in copies of the parameters, where torch's foreach implementation runs; 0 where the
    step was not measured."""
    note: str | None = None
    """What the layout leaves out or assumes, as a sentence."""
    steps: bool = True
    """False for no optimizer at all."""


def _dense(*components: str) -> tuple[State, ...]:
    return tuple(State(component=component) for component in components)


_FACTORED_NOTE = (
    f"Factored states are counted for square matrices of {MATRIX_SIDE} x {MATRIX_SIDE}; smaller matrices need more, "
    "vectors keep the full second moment."
)
_8BIT_NOTE = (
    "Tensors below 4096 elements keep float32 states in bitsandbytes (min_8bit_size); they are counted at 8 bits."
)

OPTIMIZERS: Mapping[str, OptimizerLayout] = MappingProxyType(
    {
        layout.name: layout
        for layout in (
            OptimizerLayout(
                name="adamw",
                source="torch.optim.AdamW",
                states=_dense("exp_avg", "exp_avg_sq"),
                foreach_copies=1,
            ),
            OptimizerLayout(
                name="adam",
                source="torch.optim.Adam",
                states=_dense("exp_avg", "exp_avg_sq"),
                foreach_copies=1,
            ),
            OptimizerLayout(
                name="adamw-amsgrad",
                source="torch.optim.AdamW(amsgrad=True)",
                states=_dense("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
                foreach_copies=1,
            ),
            OptimizerLayout(
                name="adamw8bit",
                source="bitsandbytes.optim.AdamW8bit",
                states=(
                    State(component="state1", dtype="uint8"),
                    State(component="state2", dtype="uint8"),
                    State(component="absmax1", dtype="float32", elements=Fraction(1, BLOCK_SIZE_8BIT)),
                    State(component="absmax2", dtype="float32", elements=Fraction(1, BLOCK_SIZE_8BIT)),
                ),
                note=_8BIT_NOTE,
            ),
            OptimizerLayout(name="sgd", source="torch.optim.SGD"),
            OptimizerLayout(
                name="sgd-momentum", source="torch.optim.SGD(momentum=...)", states=_dense("momentum_buffer")
            ),
            OptimizerLayout(
                name="adafactor",
                source="torch.optim.Adafactor",
                states=(
                    State(component="row_var", elements=_FACTOR),
                    State(component="col_var", elements=_FACTOR),
                ),
                note=_FACTORED_NOTE,
            ),
            OptimizerLayout(
                name="adafactor-hf",
                source="transformers.Adafactor",
                states=(
                    State(component="exp_avg_sq_row", elements=_FACTOR, dtype="float32"),
                    State(component="exp_avg_sq_col", elements=_FACTOR, dtype="float32"),
                ),
                note=_FACTORED_NOTE,
            ),
            OptimizerLayout(name="adagrad", source="torch.optim.Adagrad", states=_dense("sum")),
            OptimizerLayout(name="adadelta", source="torch.optim.Adadelta", states=_dense("square_avg", "acc_delta")),
            OptimizerLayout(name="adamax", source="torch.optim.Adamax", states=_dense("exp_avg", "exp_inf")),
            OptimizerLayout(name="nadam", source="torch.optim.NAdam", states=_dense("exp_avg", "exp_avg_sq")),
            OptimizerLayout(name="radam", source="torch.optim.RAdam", states=_dense("exp_avg", "exp_avg_sq")),
            OptimizerLayout(name="rmsprop", source="torch.optim.RMSprop", states=_dense("square_avg")),
            OptimizerLayout(
                name="rmsprop-momentum",
                source="torch.optim.RMSprop(momentum=...)",
                states=_dense("square_avg", "momentum_buffer"),
            ),
            OptimizerLayout(
                name="rmsprop-centered",
                source="torch.optim.RMSprop(centered=True)",
                states=_dense("square_avg", "grad_avg"),
            ),
            OptimizerLayout(name="rprop", source="torch.optim.Rprop", states=_dense("prev", "step_size")),
            OptimizerLayout(name="asgd", source="torch.optim.ASGD", states=_dense("ax")),
            OptimizerLayout(name="sparseadam", source="torch.optim.SparseAdam", states=_dense("exp_avg", "exp_avg_sq")),
            OptimizerLayout(
                name="muon",
                source="torch.optim.Muon",
                states=_dense("momentum_buffer"),
                note="torch.optim.Muon updates matrices only; embeddings and norms that another optimizer updates "
                "are counted as Muon's.",
            ),
            OptimizerLayout(
                name="lbfgs",
                source="torch.optim.LBFGS",
                states=(
                    State(component="d"),
                    State(component="prev_flat_grad"),
                    State(component="old_dirs", elements=Fraction(LBFGS_HISTORY)),
                    State(component="old_stps", elements=Fraction(LBFGS_HISTORY)),
                ),
                note=f"The history of LBFGS is counted when it is full: {LBFGS_HISTORY} steps.",
            ),
            OptimizerLayout(
                name="none",
                source="",
                note="Without an optimizer nothing is trained: no gradients, no master copies, no states.",
                steps=False,
            ),
        )
    }
)
"""Every layout, by name."""


def find_optimizer(name: str) -> OptimizerLayout:
    """Returns the layout with this name.

    Raises:
        PlanError: there is none; the message proposes the nearest.
    """
    return by_name("optimizer", name, OPTIMIZERS)
