"""Further models of a configuration in a simulated step: they are made, held, and run beside the trained one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from memtrace.errors import PlanError
from memtrace.planning.further import FurtherModel
from memtrace.planning.held_types import cast_as_loaded
from memtrace.planning.recipe import Recipe
from memtrace.planning.simulate import model_loss
from memtrace.record.units import format_bytes
from memtrace.simulation.models.builds import BatchSettings, build_bare, make_inputs, make_labels, model_class


class Held(nn.Module):
    """Weights of which nothing but their number is known; they never run."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.empty(parameters), requires_grad=False)


def makers(
    models: tuple[FurtherModel, ...], recipe: Recipe, attention: str | None
) -> Mapping[str, Callable[[], nn.Module]]:
    """Returns a function that makes each model, by name; to be called with the meta device as the default.

    Args:
        models: what is known of them.
        recipe: of the trained model.
        attention: name of an attention implementation; None for the models' own choice.
    """

    def maker(model: FurtherModel) -> Callable[[], nn.Module]:
        return lambda: _made(model, model.held_in(recipe), attention)

    return {model.name: maker(model) for model in models}


def _made(model: FurtherModel, dtype: str, attention: str | None) -> nn.Module:
    if model.parameters is not None:
        made: nn.Module = Held(model.parameters)
    else:
        made = build_bare(frozen_class(model.configuration), model.configuration, attention)
        made.requires_grad_(False).eval()
    cast_as_loaded(made, dtype)
    return made


def frozen_class(configuration: Any) -> Any:
    """Returns the class that a configuration names, else one that computes a loss, else the bare model.

    Raises:
        PlanError: transformers has none.
    """
    for name in configuration.architectures or ():
        named = getattr(transformers, name, None) if isinstance(name, str) else None
        if hasattr(named, "_from_config"):
            return named
    try:
        return model_class(configuration)
    except PlanError:
        bare = transformers.AutoModel._model_mapping
        if type(configuration) not in bare:
            raise
        found = bare[type(configuration)]
        return found[0] if isinstance(found, tuple) else found


def make_further_inputs(
    models: tuple[FurtherModel, ...], settings: BatchSettings, recipe: Recipe, batch: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the inputs of each model that runs, by its name; what the trained model is given, too, is not made twice.

    Raises:
        PlanError: a model needs inputs that nobody can guess, or the text is longer than its positions.
    """
    inputs = {}
    for model in models:
        if model.configuration is None:
            continue
        kind, dtype = frozen_class(model.configuration), getattr(torch, model.held_in(recipe))
        own = make_inputs(kind, model.configuration, settings, dtype)
        if model.configuration.is_encoder_decoder:  # its decoder reads them
            own |= make_labels(kind, model.configuration, settings)
        inputs[model.name] = {name: _shared(batch.get(name), tensor) for name, tensor in own.items()}
    return inputs


def _shared(trained: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor:
    if trained is None or (trained.shape, trained.dtype) != (tensor.shape, tensor.dtype):
        return tensor
    return trained


def loss_beside(model: nn.Module, batch: Any, /, **further: nn.Module) -> torch.Tensor:
    """Returns the loss that the model computes itself, after which each further model has run without gradients.

    Their outputs are dropped where this returns, as DPO's, KTO's and distillation's are once the loss is known.

    Args:
        model: the trained one.
        batch: its batch, and the inputs of the further models that run, by name.
        further: all further models, by name.
    """
    own, inputs = batch
    loss = model_loss(model, own)
    with torch.no_grad():
        outputs = [further[name](**of_one) for name, of_one in inputs.items()]
        del outputs
    return loss


def said_of(
    models: tuple[FurtherModel, ...], recipe: Recipe, outputs: Mapping[str, int], *, kept: bool
) -> Iterator[str]:
    """Yields what a plan assumes about each model.

    Args:
        models: all of them.
        recipe: of the trained model.
        outputs: bytes of what each one returned that ran.
        kept: whether the loop keeps outputs into the next step.
    """
    for model in models:
        dtype = model.held_in(recipe)
        if model.name not in outputs:
            yield f"{model.name}: its weights are held in {dtype}, its forward pass is not simulated."
            continue
        ends = "kept into the next step" if kept else "dropped once the loss is known"
        yield (
            f"{model.name} is held in {dtype} and runs without gradients after the forward pass of the trained model, "
            f"as in DPO and distillation; its output ({format_bytes(outputs[model.name])}) is {ends}."
        )
