"""What optimizers keep for each parameter, by the names that their state dicts give it.

Counted are tensors that grow with the parameters. Step counts and other scalars (4 bytes for each parameter tensor)
are not. The layouts of torch.optim are tests: each is compared with the state of the real optimizer after a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from types import MappingProxyType

from memtrace.errors import PlanError
from memtrace.planning.lookup import by_name
from memtrace.planning.optimizers.layouts import (
    BLOCK_SIZE_8BIT,
    FACTOR,
    LBFGS_HISTORY,
    MATRIX_SIDE,
    OptimizerLayout,
    State,
    dense,
)
from memtrace.planning.optimizers.trainer import NOT_PLANNED, OTHER_NAMES, TRAINER_LAYOUTS

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
                states=dense("exp_avg", "exp_avg_sq"),
                foreach_copies=1,
            ),
            OptimizerLayout(
                name="adam",
                source="torch.optim.Adam",
                states=dense("exp_avg", "exp_avg_sq"),
                foreach_copies=1,
            ),
            OptimizerLayout(
                name="adamw-amsgrad",
                source="torch.optim.AdamW(amsgrad=True)",
                states=dense("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
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
                name="sgd-momentum", source="torch.optim.SGD(momentum=...)", states=dense("momentum_buffer")
            ),
            OptimizerLayout(
                name="adafactor",
                source="torch.optim.Adafactor",
                states=(
                    State(component="row_var", elements=FACTOR),
                    State(component="col_var", elements=FACTOR),
                ),
                note=_FACTORED_NOTE,
            ),
            OptimizerLayout(
                name="adafactor-hf",
                source="transformers.Adafactor",
                states=(
                    State(component="exp_avg_sq_row", elements=FACTOR, dtype="float32"),
                    State(component="exp_avg_sq_col", elements=FACTOR, dtype="float32"),
                ),
                note=_FACTORED_NOTE,
            ),
            OptimizerLayout(name="adagrad", source="torch.optim.Adagrad", states=dense("sum")),
            OptimizerLayout(name="adadelta", source="torch.optim.Adadelta", states=dense("square_avg", "acc_delta")),
            OptimizerLayout(name="adamax", source="torch.optim.Adamax", states=dense("exp_avg", "exp_inf")),
            OptimizerLayout(name="nadam", source="torch.optim.NAdam", states=dense("exp_avg", "exp_avg_sq")),
            OptimizerLayout(name="radam", source="torch.optim.RAdam", states=dense("exp_avg", "exp_avg_sq")),
            OptimizerLayout(name="rmsprop", source="torch.optim.RMSprop", states=dense("square_avg")),
            OptimizerLayout(
                name="rmsprop-momentum",
                source="torch.optim.RMSprop(momentum=...)",
                states=dense("square_avg", "momentum_buffer"),
            ),
            OptimizerLayout(
                name="rmsprop-centered",
                source="torch.optim.RMSprop(centered=True)",
                states=dense("square_avg", "grad_avg"),
            ),
            OptimizerLayout(name="rprop", source="torch.optim.Rprop", states=dense("prev", "step_size")),
            OptimizerLayout(name="asgd", source="torch.optim.ASGD", states=dense("ax")),
            OptimizerLayout(name="sparseadam", source="torch.optim.SparseAdam", states=dense("exp_avg", "exp_avg_sq")),
            OptimizerLayout(
                name="muon",
                source="torch.optim.Muon",
                states=dense("momentum_buffer"),
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
            *TRAINER_LAYOUTS,
        )
    }
)
"""Every layout, by name."""


def find_optimizer(name: str) -> OptimizerLayout:
    """Returns the layout with this name, which may also be a value of Trainer's `optim=`.

    Raises:
        PlanError: there is none, and the message proposes the nearest; or what it allocates cannot be planned.
    """
    folded = name.casefold()
    if folded in NOT_PLANNED:
        raise PlanError(f"the optimizer {folded} cannot be planned: {NOT_PLANNED[folded]}")
    name = OTHER_NAMES.get(folded, name)
    return by_name("optimizer", name, OPTIMIZERS)
