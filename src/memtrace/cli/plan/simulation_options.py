"""The options of `memtrace plan --config`, and what they mean. Imports torch and transformers where they are used."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, cast

from memtrace.cli.plan.options import further_of, sharding_of
from memtrace.errors import PlanError
from memtrace.planning.sharding.deepspeed_settings import read_deepspeed
from memtrace.planning.sharding.shares import Sharding

if TYPE_CHECKING:
    from memtrace.planning.simulation_request import SimulationRequest, StepOptions

_FORMULA_ONLY = (
    "params",
    "trainable_params",
    "unquantized_params",
    "activation_ratio",
    "activation_bytes",
    "largest_layer_params",
)
_SIMULATION_ONLY = {
    "batch_size": None,
    "seq_len": None,
    "image_size": None,
    "gradient_checkpointing": False,
    "attn": None,
    "dtype": None,
    "lora_rank": None,
    "lora_targets": None,
    "keep_outputs": False,
    "padded": False,
    "fused_optimizer": False,
    "kernels": None,
    "by_module": False,
    "find_max": None,
    "deepspeed": None,
}
"""Options that need --config, with their values where they are not given."""


def add_simulation_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what a simulated plan is made from."""
    group = parser.add_argument_group("simulation, from the configuration of a transformers model")
    group.add_argument(
        "--config", metavar="PATH|NAME", help="a config.json, a directory that has one, or a name on the hub"
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="samples of one micro batch; default 1")
    group.add_argument(
        "--seq-len",
        type=int,
        metavar="N",
        help="tokens of a text (samples of a sound); default 2048, or as many as the model has positions for",
    )
    group.add_argument("--image-size", type=int, metavar="N", help="height and width of images; default: the model's")
    group.add_argument("--gradient-checkpointing", action="store_true", help="recompute layers in the backward pass")
    group.add_argument("--attn", choices=("eager", "sdpa", "flash_attention_2"), help="default: the model's own choice")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; default: the recipe's"
    )
    group.add_argument("--lora-rank", type=int, metavar="N", help="adapters on all linear layers; default 16 with LoRA")
    group.add_argument(
        "--lora-targets", metavar="NAMES", help="modules that get adapters, such as q_proj,v_proj; default all-linear"
    )
    group.add_argument(
        "--keep-outputs", action="store_true", help="a loop with out = model(**batch), which keeps the logits"
    )
    group.add_argument("--padded", action="store_true", help="texts of different lengths: attention gets a mask")
    group.add_argument("--fused-optimizer", action="store_true", help="torch's fused step, which has no temporaries")
    group.add_argument("--kernels", choices=("cuda", "cpu"), help="whose kernels and allocator; default cuda")
    group.add_argument(
        "--deepspeed",
        metavar="FILE",
        help="configuration of DeepSpeed: stage and sizes of ZeRO, instead of --zero",
    )
    group.add_argument("--by-module", action="store_true", help="list the modules that made most of the activations")
    group.add_argument(
        "--find-max", choices=("batch-size", "seq-len"), help="search the largest one that fits the device"
    )


def check_simulation_options(arguments: argparse.Namespace) -> None:
    """Checks that options of one kind of plan are not given for the other.

    Raises:
        PlanError: one is; the message names it.
    """
    if arguments.config is None:
        for name, absent in _SIMULATION_ONLY.items():
            if getattr(arguments, name) != absent:
                raise PlanError(
                    f"--{name.replace('_', '-')} needs --config: a plan from a parameter count has no steps"
                )
        return
    for name in _FORMULA_ONLY:
        if getattr(arguments, name) is not None:
            raise PlanError(f"--{name.replace('_', '-')} is for plans from a parameter count: leave it or --config out")
    if arguments.constants != "memtrace":
        raise PlanError("--constants deepspeed is a formula: leave it or --config out")


def simulation_of(arguments: argparse.Namespace) -> SimulationRequest:
    """Returns what the options ask for.

    Raises:
        PlanError: the configuration cannot be used, or an option has no meaning.
    """
    try:
        from memtrace.simulation.models.configurations import (  # noqa: PLC0415 - torch and transformers
            load_configuration,
            width_of,
        )
    except ImportError as error:
        raise PlanError(f"--config needs transformers ({error}): pip install torch-memtrace[transformers]") from error
    from memtrace.planning.simulation_request import request_of  # noqa: PLC0415
    from memtrace.simulation.kernels import Target  # noqa: PLC0415

    configuration = load_configuration(arguments.config)
    return request_of(
        cast("StepOptions", arguments),
        configuration,
        target=Target(arguments.kernels or "cuda"),
        sharding=_sharding_of(arguments, width_of(configuration)),
        further=further_of(arguments, lambda name, source: load_configuration(source)),
    )


def _sharding_of(arguments: argparse.Namespace, width: int | None) -> Sharding:
    if arguments.deepspeed is None:
        return sharding_of(arguments)
    if arguments.zero is not None or arguments.fsdp or arguments.ddp or arguments.offload or arguments.overlap_comm:
        raise PlanError("--deepspeed says how ranks share the model: leave --zero, --fsdp, --ddp and their options out")
    return read_deepspeed(arguments.deepspeed, arguments.world_size, width)
