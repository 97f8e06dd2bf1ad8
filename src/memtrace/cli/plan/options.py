"""The options of `memtrace plan`, and what they mean."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from typing import Any

from memtrace.errors import PlanError
from memtrace.planning.further import FurtherModel
from memtrace.planning.hardware import find_device
from memtrace.planning.local_device import local_device
from memtrace.planning.optimizers.states import OPTIMIZERS, find_optimizer
from memtrace.planning.recipe import DTYPE_BYTES, RECIPES, find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.shares import ZERO_STAGES, Offload, Sharding, Strategy
from memtrace.record.units import parse_bytes

_COUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,3})?)\s*([kKmMbBtT]?)\s*")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(text: str) -> int:
    """Returns the number that a text such as `8e9`, `8B`, `350M` or `7000000000` stands for.

    Raises:
        PlanError: it is none, or not a whole one.
    """
    match = _COUNT.fullmatch(text)
    value = float(match[1]) * _FACTORS[match[2].lower()] if match else math.nan
    if not math.isfinite(value) or value != int(value):
        raise PlanError(f"a count must be a whole number such as 8e9, 8B or 350M, got {text!r}")
    return int(value)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the model is."""
    group = parser.add_argument_group("model")
    group.add_argument("--params", metavar="N", help="parameters of the model, such as 8e9 or 8B")
    group.add_argument(
        "--trainable-params",
        metavar="N",
        help="parameters that are trained; by default all, or 0.2 %% on top with LoRA",
    )
    group.add_argument(
        "--unquantized-params",
        metavar="N",
        help="of those of the model, what QLoRA leaves in 16 bits: embedding and head",
    )
    group.add_argument(
        "--further-model",
        action="append",
        default=[],
        metavar="NAME=MODEL[:DTYPE]",
        help="a frozen model beside the trained one (reference, teacher, reward, encoder), again for each: a count "
        "such as 8e9, whose weights are held, or with --config a configuration, which runs, too",
    )
    group.add_argument(
        "--activation-ratio",
        type=float,
        metavar="R",
        help="what is saved for the backward pass, as a "
        "share of the weights in the type of the arithmetic, such as 0.3",
    )
    group.add_argument("--activation-bytes", metavar="SIZE", help="the same as a size, such as 6GiB")
    group.add_argument(
        "--layers",
        type=int,
        default=32,
        metavar="N",
        help="layers, for the size of what is gathered or recomputed at a time; default 32",
    )
    group.add_argument(
        "--largest-layer-params", metavar="N", help="parameters of the largest layer; by default params / layers"
    )


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares how it is trained."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--recipe", default="bf16-master", metavar="NAME", help=f"one of {', '.join(RECIPES)}; default bf16-master"
    )
    group.add_argument(
        "--optimizer", default="adamw", metavar="NAME", help=f"one of {', '.join(OPTIMIZERS)}; default adamw"
    )
    group.add_argument(
        "--accumulation-steps",
        type=int,
        default=1,
        metavar="N",
        help="micro batches for each optimizer step; default 1",
    )
    strategy = group.add_mutually_exclusive_group()
    strategy.add_argument("--zero", type=int, choices=range(4), metavar="STAGE", help="DeepSpeed ZeRO, stage 0 to 3")
    strategy.add_argument("--fsdp", action="store_true", help="FSDP, everything sharded")
    strategy.add_argument("--ddp", action="store_true", help="DistributedDataParallel")
    group.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks; default 1")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="machines, for --constants deepspeed")
    group.add_argument(
        "--offload",
        choices=[Offload.OPTIMIZER.value, Offload.PARAMETERS.value],
        help="what ZeRO or FSDP keeps in host memory",
    )
    group.add_argument("--overlap-comm", action="store_true", help="ZeRO 1 and 2 with overlap_comm: two reduce buckets")
    group.add_argument("--gradient-as-bucket-view", action="store_true", help="DDP with gradient_as_bucket_view")


def request_of(arguments: argparse.Namespace) -> PlanRequest:
    """Returns what the options ask for.

    Raises:
        PlanError: an option has no meaning, or two do not go together.
        ConfigError: a size is none.
    """
    if arguments.params is None:
        raise PlanError("a plan needs the model: give --params, such as --params 8e9")
    return PlanRequest(
        parameters=parse_count(arguments.params),
        recipe=find_recipe(arguments.recipe),
        optimizer=find_optimizer(arguments.optimizer),
        sharding=sharding_of(arguments),
        trainable_parameters=_optional_count(arguments.trainable_params),
        unquantized_parameters=_optional_count(arguments.unquantized_params),
        further=further_of(arguments, _only_counts),
        activation_ratio=arguments.activation_ratio,
        activation_bytes=None if arguments.activation_bytes is None else parse_bytes(arguments.activation_bytes),
        accumulation_steps=arguments.accumulation_steps,
        layers=arguments.layers,
        largest_layer_parameters=_optional_count(arguments.largest_layer_params),
    )


def further_of(arguments: argparse.Namespace, load: Callable[[str, str], Any]) -> tuple[FurtherModel, ...]:
    """Returns the frozen models that the options name.

    Args:
        arguments: the options.
        load: returns the configuration for the name of a model and what is said of it, where that is no count.

    Raises:
        PlanError: an option does not say what is held, or two models have one name.
    """
    models = []
    for text in arguments.further_model:
        name, equals, said = text.partition("=")
        if not equals or not said:
            raise PlanError(f"a further model must be NAME=COUNT or NAME=CONFIG, such as reference=8e9, got {text!r}")
        what, colon, dtype = said.rpartition(":")
        if not colon or dtype not in DTYPE_BYTES:
            what, dtype = said, None
        is_count = _COUNT.fullmatch(what) is not None
        models.append(
            FurtherModel(
                name=name,
                parameters=parse_count(what) if is_count else None,
                configuration=None if is_count else load(name, what),
                dtype=dtype,
            )
        )
    return tuple(models)


def _only_counts(name: str, said: str) -> None:
    raise PlanError(
        f"--further-model {name}={said} needs --config: a plan from a parameter count takes a count, such as "
        f"{name}=8e9 or {name}=8e9:bfloat16"
    )


def sharding_of(arguments: argparse.Namespace) -> Sharding:
    """Returns who holds which share by the options.

    Raises:
        PlanError: two options do not go together.
    """
    strategy = Strategy.NONE
    if arguments.zero is not None:
        strategy = ZERO_STAGES[arguments.zero]
    elif arguments.fsdp:
        strategy = Strategy.FSDP
    elif arguments.ddp:
        strategy = Strategy.DDP
    return Sharding(
        strategy=strategy,
        world_size=arguments.world_size,
        offload=Offload(arguments.offload or Offload.NONE),
        overlap_comm=arguments.overlap_comm,
        gradient_as_bucket_view=arguments.gradient_as_bucket_view,
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the plan is held against."""
    group = parser.add_argument_group("device").add_mutually_exclusive_group()
    group.add_argument("--device", metavar="NAME", help="such as H100-80GB; local asks the driver of this machine")
    group.add_argument("--capacity", metavar="SIZE", help="what a process can use of a device, such as 24GiB")


def capacity_of(arguments: argparse.Namespace) -> tuple[str, int] | None:
    """Returns name and usable bytes of the device that the options name; None where they name none.

    Raises:
        PlanError: the device is not known, or not there.
        ConfigError: the capacity is no size.
    """
    if arguments.capacity is not None:
        return arguments.capacity, parse_bytes(arguments.capacity)
    if arguments.device is None:
        return None
    if arguments.device == "local":
        return local_device(os.environ)
    device = find_device(arguments.device)
    return device.name, device.usable_bytes


def _optional_count(text: str | None) -> int | None:
    return None if text is None else parse_count(text)
