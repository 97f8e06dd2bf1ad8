"""What `memtrace plan --config` answers: the plan, and the questions that are asked of it."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rich.console import Console

from memtrace.cli.plan.simulation_options import simulation_of
from memtrace.errors import PlanError
from memtrace.planning.by_module import Holding, activation_holders
from memtrace.planning.hardware import held_against, known_as
from memtrace.planning.simulation_request import SimulationRequest, plan_simulated, simulate
from memtrace.planning.what_if.find_max import LIMIT, find_max
from memtrace.planning.what_if.in_processes import usable_processes
from memtrace.planning.what_if.remedies import Remedy
from memtrace.planning.what_if.simulated_remedies import simulated_remedies
from memtrace.record.plan import Plan, Verdict
from memtrace.simulation.models.builds import longest_text
from memtrace.simulation.operator_results import OperatorResults

_SEQUENCE_STEP = 64
"""Tokens between two lengths that a search tries."""

_GROWN = 1.5
"""Operators grow by more than this with twice the length where code loops over positions; else not at all."""

Device = tuple[str, int]
"""Name and usable bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A simulated plan and what was asked besides; None where it was not."""

    plan: Plan
    remedies: list[Remedy] | None = None
    holdings: Sequence[Holding] | None = None


def answer(arguments: argparse.Namespace, device: Device | None) -> Answer:
    """Returns the answer to the options.

    Raises:
        PlanError: a plan cannot be made from them.
    """
    with _without_remarks(), Console(stderr=True).status("simulating a training step") as status:
        request = simulation_of(arguments)
        request = replace(request, results=OperatorResults(request.target), by_module=arguments.by_module)
        if device is not None:
            request = replace(request, device=known_as(device[0]))
        if arguments.find_max is not None:
            request, found = _search(request, arguments.find_max, device, status.update)
        run = simulate(request)
        plan = plan_simulated(request, run)
        if arguments.find_max is not None:
            plan = replace(plan, setup={**plan.setup, f"largest_{arguments.find_max.replace('-', '_')}": found})
        remedies = holdings = None
        if arguments.what_if:
            remedies = simulated_remedies(
                request, plan, lambda name: status.update(f"simulating {name}"), processes=usable_processes()
            )
        if arguments.by_module:
            forward_end = run.marks.forward_end_ns
            holdings = [] if forward_end is None else activation_holders(run.timeline, run.makers, forward_end)
    if device is not None:
        plan = held_against(plan, *device, request.sharding.world_size)
        if remedies is not None:
            remedies = [remedy.on(*device) for remedy in remedies]
    return Answer(plan=plan, remedies=remedies, holdings=holdings)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Keeps what libraries log and warn about, kernels that are not there above all, away from the answer."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _search(
    request: SimulationRequest, what: str, device: Device | None, say: Callable[[str], None]
) -> tuple[SimulationRequest, int]:
    """Returns the request with the largest batch or sequence that fits, and that number."""
    if device is None:
        raise PlanError(f"--find-max {what} needs a device to fit: give --device or --capacity")

    def with_size(number: int) -> SimulationRequest:
        batch = request.batch
        resized = replace(batch, samples=number) if what == "batch-size" else replace(batch, positions=number)
        return replace(request, batch=resized)

    operators: dict[int, int] = {}

    def attempt(number: int) -> Plan:
        say(f"simulating a {what.replace('-', ' ').replace('seq len', 'sequence length')} of {number:,}")
        resized = with_size(number)
        run = simulate(resized)
        operators[number] = run.operators
        if run.operators > _GROWN * operators.get(number // 2, run.operators):
            raise PlanError("the code goes through positions one by one and a search has no end: give --seq-len")
        return held_against(plan_simulated(resized, run), *device, request.sharding.world_size)

    longest = longest_text(request.configuration) if what == "seq-len" else None
    step = 1 if what == "batch-size" else min(_SEQUENCE_STEP, longest or _SEQUENCE_STEP)
    try:
        found, _ = find_max(attempt, lambda plan: plan.verdict is Verdict.FITS, step=step, limit=longest or LIMIT)
    except PlanError as error:
        raise PlanError(f"--find-max {what} on {device[0]}: {error}") from error
    return with_size(found), found
