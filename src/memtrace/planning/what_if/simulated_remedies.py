"""What would change a simulated plan: each remedy is simulated again, and ranked by the bytes that it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from memtrace.planning.further import without_each
from memtrace.planning.recipe import find_recipe
from memtrace.planning.simulation_request import SimulationRequest
from memtrace.planning.what_if.in_processes import plans_of
from memtrace.planning.what_if.remedies import Remedy, other_shardings
from memtrace.record.plan import Plan
from memtrace.simulation.operator_results import OperatorResults


def simulated_remedies(
    request: SimulationRequest, plan: Plan, say: Callable[[str], None] = lambda name: None, *, processes: int = 1
) -> list[Remedy]:
    """Returns the changes that save anything at the peak of `plan`, the largest saving first.

    A change that the model cannot take (checkpointing without layers, a chunked loss without a head) is left out.

    Args:
        request: what `plan` was made from.
        plan: what the changes are held against.
        say: is called with the name of each change before it is waited for.
        processes: how many simulate at once, see `plans_of`; the answer is the same.
    """
    found = []
    results = OperatorResults(request.target) if request.results is None else request.results
    changes = list(candidates(replace(request, results=results, by_module=False)))
    plans = plans_of([changed for _, changed in changes], processes)
    for name, changed in changes:
        say(name)
        after = next(plans)
        if after is not None and plan.total_bytes > after.total_bytes:
            saved = plan.total_bytes - after.total_bytes
            found.append(Remedy(name=name, plan=after, saved_bytes=saved, world_size=changed.sharding.world_size))
    return sorted(found, key=lambda remedy: -remedy.saved_bytes)


def candidates(request: SimulationRequest) -> Iterator[tuple[str, SimulationRequest]]:
    """Yields a name and a changed request for each remedy that is worth a simulation."""
    model, batch, recipe = request.model, request.batch, request.recipe
    if not model.gradient_checkpointing:
        yield "gradient checkpointing", replace(request, model=replace(model, gradient_checkpointing=True))
    if model.attention == "eager":
        yield "fused attention (sdpa)", replace(request, model=replace(model, attention="sdpa"))
    if not model.chunked_loss:
        yield "a chunked loss", replace(request, model=replace(model, chunked_loss=True))
    if batch.samples > 1:
        halved = replace(batch, samples=batch.samples // 2)
        steps = 2 * request.accumulation_steps
        yield "half the batch, accumulated twice", replace(request, batch=halved, accumulation_steps=steps)
    if not recipe.trains_adapters:
        for other, title in (
            ("hf-autocast", "bfloat16 autocast"),
            ("pure-bf16", "bfloat16 throughout, no master copies"),
        ):
            if recipe.name != other:
                yield title, replace(request, recipe=find_recipe(other))
        yield "LoRA", replace(request, recipe=find_recipe("lora"))
    if request.optimizer in ("adamw", "adam", "adamw-amsgrad"):
        yield "8-bit AdamW", replace(request, optimizer="adamw8bit")
        yield "Adafactor", replace(request, optimizer="adafactor")
        yield "a fused optimizer step", replace(request, fused_step=True)
    for title, others in without_each(request.further):
        yield title, replace(request, further=others)
    for title, sharding in other_shardings(request.sharding):
        yield title, replace(request, sharding=sharding)
