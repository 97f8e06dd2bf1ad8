"""`memtrace plan`: what a step will need, whether it fits, and what would change it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memtrace.attribution.garbage import uncollected
from memtrace.cli.plan.markdown import plan_markdown
from memtrace.cli.plan.options import (
    add_device_arguments,
    add_model_arguments,
    add_training_arguments,
    capacity_of,
    request_of,
)
from memtrace.cli.plan.simulation_options import add_simulation_arguments, check_simulation_options
from memtrace.cli.plan.table import plan_table
from memtrace.cli.show import console
from memtrace.errors import PlanError
from memtrace.planning.formula import plan_by_formula
from memtrace.planning.hardware import held_against
from memtrace.planning.sharding.deepspeed_estimates import plan_by_deepspeed
from memtrace.planning.what_if.remedies import Remedy, remedies
from memtrace.record.plan import Plan, Verdict, plan_document

if TYPE_CHECKING:
    from memtrace.planning.by_module import Holding

EXIT_STATUS = {None: 0, Verdict.FITS: 0, Verdict.UNCERTAIN: 1, Verdict.DOES_NOT_FIT: 2}
"""By verdict; None where no device was named."""


class PlanCommand:
    """Plans a step from a parameter count, or from the configuration of a model."""

    name = "plan"
    summary = "Plan the memory of a step before it runs, and say whether it fits."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares model, training, device and output."""
        add_model_arguments(parser)
        add_simulation_arguments(parser)
        add_training_arguments(parser)
        add_device_arguments(parser)
        group = parser.add_argument_group("output")
        group.add_argument(
            "--constants",
            choices=("memtrace", "deepspeed"),
            default="memtrace",
            help="whose formula: deepspeed reproduces the estimators of DeepSpeed for ZeRO 2 and 3",
        )
        group.add_argument("--what-if", action="store_true", help="list what would save memory at the peak")
        group.add_argument("--format", choices=("table", "markdown", "json"), default="table")
        group.add_argument("--json", action="store_const", dest="format", const="json", help="same as --format json")

    def run(self, arguments: argparse.Namespace) -> int:
        """Prints the plan; returns 0 where it fits or no device was named, 1 where that is uncertain, 2 where not.

        Raises:
            PlanError: a plan cannot be made from the options.
            ConfigError: a size is none.
        """
        check_simulation_options(arguments)
        device = capacity_of(arguments)
        if arguments.config is not None:
            with uncollected():  # nothing of what is imported goes; a simulation collects at each micro batch
                from memtrace.cli.plan.simulated import answer  # noqa: PLC0415 - torch and transformers take seconds

                answered = answer(arguments, device)
            _print(answered.plan, answered.remedies, arguments.format, answered.holdings)
            return EXIT_STATUS[answered.plan.verdict]
        request = request_of(arguments)
        if arguments.constants == "deepspeed":
            if arguments.what_if:
                raise PlanError("--what-if plans with memtrace's constants: leave --constants deepspeed out")
            plan, found = plan_by_deepspeed(request, nodes=arguments.nodes), None
        else:
            plan, found = plan_by_formula(request), remedies(request) if arguments.what_if else None
        if device is not None:
            plan = held_against(plan, *device, request.sharding.world_size)
            found = None if found is None else [remedy.on(*device) for remedy in found]
        _print(plan, found, arguments.format)
        return EXIT_STATUS[plan.verdict]


def _print(plan: Plan, found: list[Remedy] | None, form: str, holdings: Sequence[Holding] | None = None) -> None:
    if form == "json":
        document = plan_document(plan)
        if found is not None:
            document["remedies"] = [_remedy_document(remedy) for remedy in found]
        if holdings is not None:
            document["modules"] = [
                {"name": holding.name, "modules": holding.modules, "bytes": holding.nbytes} for holding in holdings
            ]
        print(json.dumps(document, indent=2, allow_nan=False))
    elif form == "markdown":
        print(plan_markdown(plan, found, holdings))
    else:
        console().print(plan_table(plan, found, holdings))


def _remedy_document(remedy: Remedy) -> dict[str, str | int | None]:
    return {
        "name": remedy.name,
        "total_bytes": remedy.plan.total_bytes,
        "saved_bytes": remedy.saved_bytes,
        "world_size": remedy.world_size,
        "verdict": remedy.plan.verdict,
    }
