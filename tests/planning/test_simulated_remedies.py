"""What is shared between the simulations of a plan changes none of their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import transformers

from memtrace.errors import PlanError
from memtrace.planning.recipe import find_recipe
from memtrace.planning.sharding.shares import Sharding, Strategy
from memtrace.planning.simulated_run import SimulatedRun
from memtrace.planning.simulation_request import SimulationRequest, plan_simulated, simulate
from memtrace.planning.what_if.simulated_remedies import candidates, simulated_remedies
from memtrace.record.plan import Plan
from memtrace.simulation import mode as simulation
from memtrace.simulation.kernels import Target
from memtrace.simulation.models.builds import BatchSettings, ModelSettings
from memtrace.simulation.operator_results import OperatorResults

_WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = transformers.LlamaConfig(vocab_size=300, num_key_value_heads=2, **_WIDTH)
MIXTRAL = transformers.MixtralConfig(
    vocab_size=300, num_key_value_heads=2, num_local_experts=4, experts_implementation="batched_mm", **_WIDTH
)
GPT2 = transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)
T5 = transformers.T5Config(vocab_size=300, d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4)


def request(configuration: Any, recipe: str, **model: Any) -> SimulationRequest:
    """A request for two samples of 32 tokens."""
    return SimulationRequest(
        configuration=configuration,
        recipe=find_recipe(recipe),
        model=ModelSettings(**model),
        batch=BatchSettings(samples=2, positions=32),
    )


def history(run: SimulatedRun) -> list[tuple[int, int]]:
    """Every allocation and free, in order, without its time; what is freed at one go has no order of its own."""
    found: list[tuple[int, int]] = []
    for frees, events in groupby(run.events(), key=lambda event: event.delta < 0):
        changes = [(event.address, event.delta) for event in events]
        found += sorted(changes) if frees else changes
    return found


def history_or_refusal(asked: SimulationRequest) -> tuple[object, object]:
    """Every allocation and free, and all moments; the beginning of the refusal where there is one."""
    try:
        run = simulate(asked)
    except PlanError as error:
        return "refused", str(error)[:60]
    return history(run), run.moments


def apart(asked: SimulationRequest) -> Plan | None:
    """The plan of a request by itself; None where it is refused."""
    try:
        return plan_simulated(asked)
    except PlanError:
        return None


REQUESTS = {
    "llama": request(LLAMA, "bf16-master"),
    "mixtral": request(MIXTRAL, "hf-autocast"),
    "gpt2-tied": request(GPT2, "fp32", attention="eager"),
    "t5-checkpointing": request(T5, "hf-autocast", gradient_checkpointing=True),
    "gpt2-lora": request(GPT2, "lora", gradient_checkpointing=True),
}


def check(asked: SimulationRequest, changes: Sequence[SimulationRequest]) -> None:
    """Holds runs that share what is known of operators, one after the other, against the same runs by themselves."""
    shared = replace(asked, results=OperatorResults(asked.target), by_module=False)
    for changed in (asked, *changes):
        assert apart(replace(changed, results=shared.results, by_module=False)) == apart(changed)


@pytest.mark.parametrize("name", REQUESTS)
def test_plans_that_share_what_is_known_are_those_that_do_not(name: str) -> None:
    """Byte for byte: moments, reserved memory and assumptions; one or two of the remedies, others for each family."""
    position = list(REQUESTS).index(name)
    check(REQUESTS[name], [changed for _, changed in candidates(REQUESTS[name])][position::8])


@pytest.mark.long
@pytest.mark.parametrize("name", REQUESTS)
def test_all_plans_that_share_what_is_known_are_those_that_do_not(name: str) -> None:
    """The same for all remedies of all families."""
    check(REQUESTS[name], [changed for _, changed in candidates(REQUESTS[name])])


@pytest.mark.long
def test_remedies_are_the_plans_that_each_makes_by_itself() -> None:
    """Those that save anything, with the plan that the changed request has alone."""
    asked = request(LLAMA, "lora")
    before = plan_simulated(asked)
    by_name = {name: apart(changed) for name, changed in candidates(asked)}
    expected = {name: plan for name, plan in by_name.items() if plan and plan.total_bytes < before.total_bytes}
    assert expected
    assert {remedy.name: remedy.plan for remedy in simulated_remedies(asked, before)} == expected


@pytest.mark.parametrize(
    ("optimizer", "fused_step"),
    [("adamw", False), ("adamw", True), ("adamw-amsgrad", False), ("sgd-momentum", True)],
)
def test_lists_of_shards_are_answered_as_dtensor_answers_them(
    optimizer: str, fused_step: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An FSDP2 plan of three uneven ranks has the same history, or is refused, when DTensor is asked for every list."""
    asked = replace(
        request(LLAMA, "hf-autocast"),
        optimizer=optimizer,
        fused_step=fused_step,
        sharding=Sharding(strategy=Strategy.FSDP, world_size=3, rank=2),
    )
    fast = history_or_refusal(asked)
    monkeypatch.setattr(simulation, "without_wrappers", lambda *_: None)
    assert fast == history_or_refusal(asked)


def test_what_a_run_has_learned_serves_the_next() -> None:
    """The second run of a request asks no fake kernel, has the same history, and nobody shares between targets."""
    asked = replace(request(LLAMA, "pure-bf16"), results=OperatorResults(Target.CUDA))
    first = simulate(asked)
    assert asked.results is not None
    known = len(asked.results)
    second = simulate(asked)
    assert len(asked.results) == known > 0
    assert history(first) == history(second) == history(simulate(replace(asked, results=None, by_module=False)))
    with pytest.raises(AssertionError, match="another kind of device"):
        simulate(replace(asked, target=Target.CPU))
