"""Further models in plans: a reference, a teacher and an average, beside the model that is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from laws.birth import STRICT, events_from_birth
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, T5Config

import memtrace
from memtrace.errors import PlanError
from memtrace.planning.comparison import compare
from memtrace.planning.formula import plan_by_formula
from memtrace.planning.further import FurtherModel
from memtrace.planning.optimizers.states import find_optimizer
from memtrace.planning.recipe import find_recipe
from memtrace.planning.request import PlanRequest
from memtrace.planning.sharding.shares import Offload, Sharding, Strategy
from memtrace.planning.simulation_request import SimulationRequest, plan_simulated
from memtrace.planning.what_if.remedies import remedies
from memtrace.planning.what_if.simulated_remedies import candidates
from memtrace.record.breakdown import EntryKey, StepRecord
from memtrace.record.categories import PERSISTENT, Category, Moment
from memtrace.record.plan import Plan
from memtrace.record.units import format_bytes
from memtrace.simulation.kernels import Target
from memtrace.simulation.models.builds import BatchSettings, make_batch
from memtrace.tracing.tracer import Tracer

SIZES: dict[str, Any] = {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
STUDENT = LlamaConfig(**SIZES, num_hidden_layers=2, use_cache=False)
TEACHER = LlamaConfig(**SIZES, num_hidden_layers=6, use_cache=False)
BATCH = BatchSettings(samples=4, positions=32)
LOGITS = 4 * 4 * 32 * 2000
"""Bytes of the logits of either model, in float32."""
REQUEST = SimulationRequest(
    configuration=STUDENT,
    recipe=find_recipe("fp32"),
    batch=BATCH,
    target=Target.CPU,
    further=(FurtherModel(name="teacher", configuration=TEACHER), FurtherModel(name="ema", parameters=10**6)),
)


def words() -> dict[str, torch.Tensor]:
    return make_batch(STUDENT, BATCH, torch.float32)


def preference(model: nn.Module, batch: Any, reference: nn.Module) -> torch.Tensor:
    """DPO's loss: the first half of the batch is preferred to the second."""

    def likelihoods(of: nn.Module) -> torch.Tensor:
        logits = of(input_ids=batch["input_ids"]).logits[:, :-1]
        return F.log_softmax(logits, -1).gather(-1, batch["input_ids"][:, 1:, None]).sum((1, 2))

    policy = likelihoods(model)
    with torch.no_grad():
        gained = policy - likelihoods(reference)
    chosen, rejected = (policy - policy.detach() + gained).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def distillation(model: nn.Module, batch: Any, teacher: nn.Module, **held: nn.Module) -> torch.Tensor:
    """The model's own loss, and the logits of a teacher that are made for it."""
    loss = model(**batch).loss
    with torch.no_grad():
        teacher(input_ids=batch["input_ids"])
    return loss


def as_frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def measured(loss: Any, **makers: Any) -> StepRecord:
    """Trains two steps on a CPU, recorded from before there was a model."""
    torch.manual_seed(0)
    with events_from_birth() as source, torch.backends.mkldnn.flags(enabled=False):
        model = LlamaForCausalLM(STUDENT)
        further = {name: make() for name, make in makers.items()}
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        with Tracer(model, optimizer, STRICT, source=source, further_models=further) as tracer:
            for _ in range(2):
                loss(model, words(), **further).backward()
                optimizer.step()
                optimizer.zero_grad()
        record = tracer.latest
    assert record is not None
    assert record.traced
    for moment in record.moments.values():
        assert moment.total_bytes == moment.allocated_bytes
    return record


def persistent(plan_or_record: Plan | StepRecord) -> dict[EntryKey, int]:
    entries = plan_or_record.moments[Moment.STEP_END].entries
    return {key: size for key, size in entries.items() if key.category in PERSISTENT}


def held(plan: Plan, component: str, moment: Moment = Moment.STEP_END) -> int:
    entries = plan.moments[moment].entries
    return sum(s for key, s in entries.items() if (key.category, key.component) == (Category.WEIGHTS, component))


def size_of(model: nn.Module) -> int:
    """Buffers, too: all that a further model holds is weights."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def check(planned: Plan, record: StepRecord) -> None:
    """What lasts is the same to the byte, and each total within 1 %."""
    assert persistent(planned) == persistent(record)
    for moment, differences in compare(planned, record).items():
        assert abs(differences[-1].ratio or 0) <= 0.01, moment


def test_a_reference_is_planned_as_the_live_tracer_measures_it() -> None:
    """DPO with a loss of one's own, which gets the reference by its name."""

    def make() -> nn.Module:
        return as_frozen(LlamaForCausalLM(TEACHER).to(torch.bfloat16))

    with torch.backends.mkldnn.flags(enabled=False):
        planned = memtrace.plan(
            lambda: LlamaForCausalLM(STUDENT), words, loss=preference, device="cpu", further_models={"reference": make}
        )
    check(planned, measured(preference, reference=make))
    with torch.device("meta"):
        assert held(planned, "reference") == size_of(make())
    assert "reference is held as its function makes it, and runs where the loss runs it." in planned.assumptions
    assert planned.setup["further_models"] == "reference"


def test_a_teacher_of_a_configuration_runs_beside_the_model() -> None:
    """Planned from its configuration it runs after the trained model, without gradients; of a count weights are
    held."""
    with torch.backends.mkldnn.flags(enabled=False):
        planned = plan_simulated(REQUEST)
        alone = plan_simulated(replace(REQUEST, further=()))
        kept = plan_simulated(replace(REQUEST, keeps_outputs=True))
    average = nn.Linear(1000, 1000, bias=False)
    teacher = as_frozen(LlamaForCausalLM(TEACHER))
    record = measured(
        distillation,
        teacher=lambda: as_frozen(LlamaForCausalLM(TEACHER)),
        ema=lambda: nn.Linear(1000, 1000, bias=False),
    )
    check(planned, record)
    size = size_of(teacher)
    assert (held(planned, "teacher"), held(planned, "ema")) == (size, average.weight.nbytes)
    beyond = planned.moments[Moment.STEP_END].total_bytes - alone.moments[Moment.STEP_END].total_bytes
    assert beyond == size + average.weight.nbytes
    both = kept.moments[Moment.STEP_END].total_bytes - planned.moments[Moment.STEP_END].total_bytes
    assert 2 * LOGITS <= both <= 2 * LOGITS + 512
    said = "\n".join(planned.assumptions)
    assert "teacher is held in float32 and runs without gradients" in said
    assert f"its output ({format_bytes(LOGITS)}) is dropped once the loss is known" in said
    assert "ema: its weights are held in float32, its forward pass is not simulated." in said


@pytest.mark.parametrize("strategy", [Strategy.DDP, Strategy.ZERO2, Strategy.ZERO3, Strategy.FSDP])
def test_engines_share_further_models_out_where_they_share_weights(strategy: Strategy) -> None:
    """ZeRO 3 and FSDP hold a part of each and gather it layer by layer; elsewhere each rank has all of it."""
    recipe = find_recipe("pure-bf16")
    request = replace(REQUEST, recipe=recipe, sharding=Sharding(strategy=strategy, world_size=2, reduce_bucket=20_000))
    planned, alone = plan_simulated(request), plan_simulated(replace(request, further=()))
    with torch.device("meta"):
        teacher = LlamaForCausalLM(TEACHER)
    whole = 2 * sum(parameter.numel() for parameter in teacher.parameters())
    buffers = sum(buffer.nbytes for buffer in teacher.buffers())
    shared = strategy in (Strategy.ZERO3, Strategy.FSDP)
    assert held(planned, "teacher") == buffers + (whole // 2 if shared else whole)
    assert held(planned, "ema") == (10**6 if shared else 2 * 10**6)
    unclaimed = [plan.moments[Moment.PEAK][Category.UNATTRIBUTED] for plan in (planned, alone)]
    assert unclaimed[0] - unclaimed[1] <= 512
    assert any(said.startswith("teacher and ema: ") for said in planned.assumptions)


def test_a_formula_counts_their_weights() -> None:
    """In the type of the model unless another is said; offloaded with the weights, and a remedy leaves them out."""
    request = PlanRequest(
        parameters=8 * 10**9,
        recipe=find_recipe("bf16-master"),
        optimizer=find_optimizer("adamw"),
        further=(FurtherModel(name="ref", parameters=8 * 10**9), FurtherModel(name="rm", parameters=1, dtype="uint8")),
    )
    zero3 = Sharding(strategy=Strategy.ZERO3, world_size=8)
    for asked, of_ref in (
        (request, 16 * 10**9),
        (replace(request, sharding=Sharding(strategy=Strategy.ZERO2, world_size=8)), 16 * 10**9),
        (replace(request, sharding=zero3), 2 * 10**9),
        (replace(request, sharding=replace(zero3, offload=Offload.PARAMETERS)), 0),
        (replace(request, recipe=find_recipe("qlora")), 16 * 10**9),
        (replace(request, recipe=find_recipe("fp32")), 32 * 10**9),
    ):
        planned = plan_by_formula(asked)
        assert held(planned, "ref") == of_ref
        assert held(planned, "rm") == (1 if of_ref else 0)
        assert planned.setup["further_models"] == "ref, rm"
    saved = {remedy.name: remedy.saved_bytes for remedy in remedies(request)}
    assert saved["outputs of ref computed before the training"] == 16 * 10**9
    assert "outputs of teacher computed before the training" in dict(candidates(REQUEST))


def test_encoders_and_names_of_any_kind() -> None:
    """A frozen vision tower gets images of its own, an encoder-decoder its labels; any name is one."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    tower = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, architectures=["CLIPVisionModel"])
    seq2seq = T5Config(vocab_size=2000, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    models = {"model": tower, "batch": seq2seq}
    further = tuple(FurtherModel(name=name, configuration=made) for name, made in models.items())
    planned = plan_simulated(replace(REQUEST, further=further))
    assert held(planned, "model") > 0
    assert held(planned, "batch") > 4 * 2000 * 64
    alone = memtrace.plan(lambda: LlamaForCausalLM(STUDENT), words, further_models={"model": lambda: nn.Linear(8, 8)})
    assert held(alone, "model") == 4 * 72
    assert "model is held as its function makes it, and does not run." in alone.assumptions


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "frozen", "parameters": 1}, "neither 'trainable' nor 'frozen', got 'frozen'"),
        ({"name": " ", "parameters": 1}, "must be a text that is not blank"),
        ({"name": "ref", "parameters": 0}, "parameters of ref must be 1.."),
        ({"name": "ref", "parameters": 1, "dtype": "int4"}, "the type of ref must be one of float32"),
        ({"name": "ref", "configuration": TEACHER, "dtype": "uint8"}, "must be one of float32, bfloat16, float16, got"),
    ],
)
def test_what_cannot_be_a_further_model(model: dict[str, Any], message: str) -> None:
    """The error says what was wrong and what was expected."""
    with pytest.raises(PlanError, match=message):
        FurtherModel(**model)


def test_what_a_plan_cannot_hold_is_said() -> None:
    """Two models of one name, no module at all, and a configuration where a count is needed."""
    twice = (FurtherModel(name="ref", parameters=1),) * 2
    with pytest.raises(PlanError, match="need names of their own, got 'ref' 2 times"):
        replace(REQUEST, further=twice)
    formula = PlanRequest(parameters=1, recipe=find_recipe("fp32"), optimizer=find_optimizer("adamw"))
    with pytest.raises(PlanError, match="takes a count for teacher"):
        replace(formula, further=REQUEST.further)
    with pytest.raises(PlanError, match=r"ref must be made as a torch.nn.Module, got Tensor"):
        memtrace.plan(lambda: LlamaForCausalLM(STUDENT), words, further_models={"ref": lambda: torch.ones(2)})  # type: ignore[dict-item,return-value]
    with pytest.raises(PlanError, match="neither 'trainable' nor 'frozen'"):
        memtrace.plan(lambda: LlamaForCausalLM(STUDENT), words, further_models={"frozen": lambda: nn.Linear(1, 1)})
