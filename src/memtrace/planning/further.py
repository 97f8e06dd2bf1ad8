"""Further models in a plan: those that a training holds beside the trained one, such as a reference or a teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from memtrace.errors import PlanError
from memtrace.planning.recipe import DTYPE_BYTES, Recipe
from memtrace.planning.sharding.shares import Sharding

MAX_PARAMETERS = 10**15

_TAKEN = frozenset({"trainable", "frozen"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherModel:
    """A model that is not trained: its weights are a component of their own."""

    name: str
    """The component, as `further_models=` names it in a live run."""
    parameters: int | None = None
    """How many it has, where that is all that is known: its weights are held, and it never runs."""
    configuration: Any = None
    """An object of transformers, where its forward pass is simulated."""
    dtype: str | None = None
    """Type of its weights; None for the one that the trained model is loaded in."""

    def __post_init__(self) -> None:
        if not self.name.strip() or self.name in _TAKEN:
            raise PlanError(
                "the name of a further model must be a text that is not blank, and neither 'trainable' nor 'frozen', "
                f"got {self.name!r}"
            )
        if self.parameters is not None and not 1 <= self.parameters <= MAX_PARAMETERS:
            raise PlanError(f"parameters of {self.name} must be 1..{MAX_PARAMETERS}, got {self.parameters}")
        known = [dtype for dtype in DTYPE_BYTES if self.configuration is None or dtype != "uint8"]
        if self.dtype is not None and self.dtype not in known:
            raise PlanError(f"the type of {self.name} must be one of {', '.join(known)}, got {self.dtype!r}")

    def held_in(self, recipe: Recipe) -> str:
        """Returns the type of its weights beside a model that is trained with a recipe."""
        return self.dtype or recipe.loaded


def check_further(models: Sequence[FurtherModel]) -> None:
    """Checks that no two have one name.

    Raises:
        PlanError: two have.
    """
    (name, times), *_ = Counter(model.name for model in models).most_common(1) or [("", 0)]
    if times > 1:
        raise PlanError(f"further models need names of their own, got {name!r} {times} times")


def without_each(models: Sequence[FurtherModel]) -> Iterator[tuple[str, tuple[FurtherModel, ...]]]:
    """Yields a title and the others for each model: a remedy, since what a frozen model says can be kept on disk."""
    for model in models:
        others = tuple(other for other in models if other is not model)
        yield f"outputs of {model.name} computed before the training", others


def further_setup(models: Sequence[FurtherModel]) -> dict[str, str | int | float]:
    """Returns what a plan's setup says of them; nothing where there are none."""
    return {"further_models": ", ".join(model.name for model in models)} if models else {}


def further_sharding(models: Sequence[FurtherModel], sharding: Sharding) -> Iterator[str]:
    """Yields who holds further models, where there are ranks."""
    if models and sharding.world_size > 1:
        names = " and ".join(model.name for model in models)
        if sharding.shards_weights:
            yield f"{names}: shared out between the ranks as the trained model is, which is what TRL does."
        else:
            yield f"{names}: whole on each rank."
