"""What an optimizer keeps, as data: the rows of `memtrace.planning.optimizers.states`."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

MATRIX_SIDE = 4096
"""Rows and columns of the square matrices that factored states are counted for: Llama-3-8B's hidden size."""

BLOCK_SIZE_8BIT = 256
"""Elements that share one float32 scale. Source: bitsandbytes, optim/optimizer.py, `blocksize = 256`."""

LBFGS_HISTORY = 100
"""Steps that torch.optim.LBFGS remembers by default (`history_size`)."""

RANK = 128
"""Directions that GaLore and APOLLO project gradients on, Trainer's default."""

FACTOR = Fraction(1, MATRIX_SIDE)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One tensor of an optimizer's state."""

    component: str
    """Its name in the state dict."""
    elements: Fraction = Fraction(1)
    """Elements for each parameter."""
    dtype: str | None = None
    """Its type; None where it has the type of the tensor that the optimizer updates."""
    low_rank: bool = False
    """Whether matrices keep it for a projection onto `RANK` directions; others keep it whole."""


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
    paged: bool = False
    """Whether the states lie in managed memory, outside of torch's allocator, which the driver moves to the host.

    Not the scales of 8-bit states, nor states of small parameters: those stay on the device."""
    steps: bool = True
    """False for no optimizer at all."""


def is_scale(state: State) -> bool:
    """Returns whether these are the float32 scales of an 8-bit state, which bitsandbytes never pages."""
    return state.component.startswith("absmax")


def dense(*components: str, dtype: str | None = None) -> tuple[State, ...]:
    """Returns states of one element for each parameter."""
    return tuple(State(component=component, dtype=dtype) for component in components)


def blockwise(*components: str, copies: int = 1) -> tuple[State, ...]:
    """Returns the 8-bit states of bitsandbytes with these numbers, such as `1`; the first has so many copies."""
    states: list[State] = []
    for number in components:
        many = copies if number == "1" else 1
        states.append(State(component=f"state{number}", dtype="uint8", elements=Fraction(many)))
    for number in components:
        scales = Fraction(copies if number == "1" else 1, BLOCK_SIZE_8BIT)
        states.append(State(component=f"absmax{number}", dtype="float32", elements=scales))
    return tuple(states)
