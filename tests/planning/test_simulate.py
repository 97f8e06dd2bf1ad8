"""Plans from a model's own code: what they hold, for which devices and recipes, and what they refuse."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import memtrace
from memtrace.errors import PlanError
from memtrace.planning.optimizers.simulated import StepKernels, make_optimizer
from memtrace.record.breakdown import EntryKey
from memtrace.record.categories import Category, Moment
from memtrace.record.plan import Plan, Verdict, parse_plan, plan_document

WIDTH, DEPTH, SAMPLES = 64, 4, 16
WEIGHTS = DEPTH * (WIDTH * WIDTH + WIDTH)
"""Parameters of the model below."""


class Tower(nn.Module):
    """Equal linear layers with dropout, checkpointed or not; returns its loss."""

    def __init__(self, *, checkpointed: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.checkpointed, self.dropout = checkpointed, dropout

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = features
        for layer in self.layers:
            run = self._run(layer)
            hidden = checkpoint(run, hidden, use_reentrant=False) if self.checkpointed else run(hidden)
        return hidden.float().square().mean()

    def _run(self, layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda hidden: F.dropout(F.gelu(layer(hidden)), self.dropout)


def features(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"features": torch.zeros(SAMPLES, WIDTH, dtype=dtype)}


def planned(make: Callable[[], nn.Module] = Tower, batch: Any = features, **settings: Any) -> Plan:
    return memtrace.plan(make, batch, **settings)


def entry(plan: Plan, category: Category, component: str = "", dtype: str = "float32") -> int:
    return plan.moments[Moment.PEAK].entries.get(EntryKey(category, component, dtype), 0)


def test_states_are_elements_times_their_size() -> None:
    """Weights, gradients and both moments of AdamW in float32 take 16 bytes for each parameter."""
    plan = planned(device="cpu")
    assert [
        entry(plan, Category.WEIGHTS, "trainable"),
        entry(plan, Category.GRADIENTS),
        entry(plan, Category.OPTIMIZER_STATE, "exp_avg"),
        entry(plan, Category.OPTIMIZER_STATE, "exp_avg_sq"),
    ] == [4 * WEIGHTS] * 4
    assert plan.setup["parameters"] == WEIGHTS
    assert plan.setup["batch"] == f"{SAMPLES} x {WIDTH}"


def test_categories_add_up_to_what_is_allocated_at_every_moment() -> None:
    """The sum of the entries is the running total of the simulated allocator, at all four moments."""
    plan = planned(optimizer="sgd-momentum")
    assert set(plan.moments) == set(Moment)
    for breakdown in plan.moments.values():
        assert breakdown.total_bytes == breakdown.allocated_bytes


def test_a_plan_for_cuda_reserves_what_its_blocks_need() -> None:
    """Reserved is at least allocated, and in whole segments of CUDA's allocator; a CPU reserves nothing."""
    plan = planned()
    assert plan.reserved_bytes is not None
    assert plan.allocated.high is not None
    assert plan.total_bytes <= plan.allocated.high <= plan.reserved_bytes
    assert plan.reserved_bytes % 2**21 == 0
    assert planned(device="cpu").reserved_bytes is None


def test_cuda_steps_over_lists_of_parameters_and_a_cpu_one_by_one() -> None:
    """The step of AdamW holds a temporary for all parameters on a GPU, and for the largest one on a CPU."""
    one = WIDTH * WIDTH * 4
    sizes = [
        plan.moments[Moment.PEAK].total_bytes - plan.moments[Moment.BACKWARD_END].total_bytes
        for plan in (planned(), planned(device="cpu"))
    ]
    assert sizes[0] == 4 * WEIGHTS
    assert one <= sizes[1] < 3 * one


def test_dropout_saves_a_mask_of_booleans_on_cuda() -> None:
    """One byte for each element on CUDA, where a CPU saves the scaled mask in the type of the input."""
    saved = [
        dropped.moments[Moment.FORWARD_END][Category.ACTIVATIONS]
        - kept.moments[Moment.FORWARD_END][Category.ACTIVATIONS]
        for dropped, kept in (
            (planned(lambda: Tower(dropout=0.1), device=device), planned(device=device)) for device in ("cuda", "cpu")
        )
    ]
    elements = SAMPLES * WIDTH * DEPTH
    assert saved == [elements, 4 * elements]


def test_checkpointing_keeps_the_inputs_of_blocks_alone() -> None:
    """Activations at the end of the forward pass are one tensor for each checkpointed block."""
    kept = planned(lambda: Tower(checkpointed=True)).moments[Moment.FORWARD_END][Category.ACTIVATIONS]
    assert kept <= (DEPTH + 1) * SAMPLES * WIDTH * 4
    assert kept <= planned().moments[Moment.FORWARD_END][Category.ACTIVATIONS] / 2


def test_accumulation_keeps_gradients_beside_the_activations() -> None:
    """With a second micro batch the gradients of the first are there at the end of the forward pass."""
    one, two = planned(), planned(accumulation_steps=2)
    assert one.moments[Moment.FORWARD_END][Category.GRADIENTS] == 0
    assert two.moments[Moment.FORWARD_END][Category.GRADIENTS] == 4 * WEIGHTS
    assert two.setup["tokens"] == 2 * int(one.setup["tokens"])


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("fp32", {"weights": 4, "gradients": 4, "optimizer_state": 8}),
        ("hf-autocast", {"weights": 4, "gradients": 4, "optimizer_state": 8}),
        ("pure-bf16", {"weights": 2, "gradients": 2, "optimizer_state": 4}),
        ("bf16-master", {"weights": 2, "gradients": 2 + 4, "optimizer_state": 8, "master_weights": 4}),
        ("fp16-master", {"weights": 2, "gradients": 2 + 4, "optimizer_state": 8, "master_weights": 4}),
        ("megatron", {"weights": 2, "gradients": 4, "optimizer_state": 8, "master_weights": 4}),
    ],
)
def test_recipes_keep_their_copies(recipe: str, expected: dict[str, int]) -> None:
    """Bytes for each parameter while the optimizer steps; master copies get gradients in their own type for it."""
    dtype = {"pure-bf16": torch.bfloat16, "bf16-master": torch.bfloat16, "megatron": torch.bfloat16}
    batch = features(dtype.get(recipe, torch.float16 if recipe == "fp16-master" else torch.float32))
    step_end = planned(batch=lambda: batch, recipe=recipe).moments[Moment.STEP_END].by_category()
    assert {name: step_end.get(Category(name), 0) / WEIGHTS for name in expected} == expected
    assert ("master_weights" in expected) == (Category.MASTER_WEIGHTS in step_end)


def test_autocast_keeps_casts_of_weights_until_the_backward_pass() -> None:
    """The bfloat16 copies of the matrices are transient weights, not activations; the first one is not needed again."""
    plan = planned(recipe="hf-autocast")
    assert plan.moments[Moment.FORWARD_END][Category.TRANSIENT_WEIGHTS] == 2 * (DEPTH - 1) * WIDTH * WIDTH


def test_eight_bit_states_take_a_byte_and_their_scales() -> None:
    """Large matrices have one byte for each moment and a float32 for each block of 256; small vectors stay float32."""
    state = planned(optimizer="adamw8bit").moments[Moment.STEP_END][Category.OPTIMIZER_STATE]
    matrix, vector = WIDTH * WIDTH, WIDTH
    assert state == DEPTH * 2 * (matrix + matrix // 256 * 4 + vector * 4)


@pytest.mark.parametrize("name", ["adafactor", "adafactor-hf", "rmsprop", "adagrad", "sgd", "nadam", "asgd", "rprop"])
def test_other_optimizers_are_run_as_they_are(name: str) -> None:
    """The state at the end of a simulated step has the size of the state after a real one."""
    real = Tower()
    optimizer = make_optimizer(name, StepKernels.LOOP)(list(real.parameters()))
    real(**features()).backward()
    optimizer.step()
    size = sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    )
    assert planned(optimizer=name, device="cpu").moments[Moment.STEP_END][Category.OPTIMIZER_STATE] == size


def test_any_function_that_makes_an_optimizer_will_do() -> None:
    """A fused step has no temporaries: the peak is where the backward pass ends, or earlier."""
    plan = planned(optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True))
    assert plan.optimizer == "custom"
    assert plan.moments[Moment.STEP_END].total_bytes == plan.moments[Moment.BACKWARD_END].total_bytes


def test_a_loss_of_ones_own_is_called_with_model_and_batch() -> None:
    """Models that return no loss need a function; what it saves belongs to the forward pass."""

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(batch), torch.zeros(SAMPLES, dtype=torch.long))

    plan = planned(lambda: nn.Linear(WIDTH, WIDTH), lambda: torch.zeros(SAMPLES, WIDTH), loss=loss, device="cpu")
    logits = SAMPLES * WIDTH * 4
    assert plan.moments[Moment.FORWARD_END][Category.ACTIVATIONS] >= logits


def test_the_same_plan_twice_is_the_same_plan() -> None:
    """No clock, no address and no random number shows in a plan."""
    documents = [plan_document(planned(lambda: Tower(dropout=0.1))) for _ in range(2)]
    assert documents[0] == documents[1]
    assert parse_plan(documents[0], "plan.json").moments == planned(lambda: Tower(dropout=0.1)).moments


def test_plans_do_not_depend_on_when_cycles_are_collected() -> None:
    """One plan after the other, collected after every few objects: torch before 2.10 then took storages for its own.

    Python goes on collecting where it did before, also after a plan that was refused.
    """
    before = gc.get_threshold()
    expected = plan_document(planned(lambda: Tower(dropout=0.1)))
    gc.set_threshold(20)
    try:
        for _ in range(8):
            assert plan_document(planned(lambda: Tower(dropout=0.1))) == expected
        with pytest.raises(PlanError):
            planned(batch=dict)
        assert gc.isenabled()
        gc.disable()
        planned()
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.set_threshold(*before)


def test_random_numbers_of_the_caller_are_as_before() -> None:
    """A plan between two lines of a script changes neither of them."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    planned(lambda: Tower(dropout=0.1))
    assert torch.equal(torch.rand(3), expected)


def attention(batch: int = 2, heads: int = 4, rows: int = 32, size: int = 16) -> nn.Module:
    """A module whose forward pass is one attention over its only parameter."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(size, size, bias=False)

        def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            query = self.projection(hidden).view(batch, rows, heads, size).transpose(1, 2)
            return F.scaled_dot_product_attention(query, query, query, attn_mask=mask).sum()

    return Attention()


def test_attention_on_cuda_saves_no_matrix_of_scores() -> None:
    """Flash attention saves query, output and one float32 for each row."""
    hidden = torch.zeros(2, 32, 4, 16, dtype=torch.bfloat16)
    plan = planned(attention, lambda: {"hidden": hidden}, recipe="pure-bf16")
    elements, rows = 2 * 32 * 4 * 16, 2 * 4 * 32
    saved = plan.moments[Moment.FORWARD_END]
    assert saved[Category.INPUTS] == 2 * elements
    assert saved.entries[EntryKey(Category.ACTIVATIONS, "", "bfloat16")] == 2 * 2 * elements
    assert saved.entries[EntryKey(Category.ACTIVATIONS, "", "float32")] == 4 * rows


def test_a_named_device_has_its_own_workspaces_and_a_verdict() -> None:
    """64 MiB on an H200, whose memory is more than enough; 17,039,360 bytes where nobody says which GPU it is."""
    anywhere, on_hopper = planned(), planned(device="H200")
    assert entry(anywhere, Category.WORKSPACES, "cublas", "") == 17_039_360
    assert entry(on_hopper, Category.WORKSPACES, "cublas", "") == 64 * 2**20
    assert anywhere.verdict is None
    assert on_hopper.verdict is Verdict.FITS
    assert "--device says on which" in anywhere.assumptions[-1]
    assert "H200-141GB" in on_hopper.assumptions[-1]
    assert Category.WORKSPACES not in planned(device="cpu").moments[Moment.PEAK].by_category()


def test_a_plan_says_only_what_matters_for_it() -> None:
    """Attention, convolutions and embeddings are spoken of where they run."""
    words = ("Attention", "convolutions", "embeddings")

    def said(plan: Plan) -> list[bool]:
        return [any(word in sentence for sentence in plan.assumptions) for word in words]

    def convolve() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 1))

    def images() -> torch.Tensor:
        return torch.zeros(2, 3, 8, 8)

    def mean(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).mean()

    assert said(planned()) == [False, False, False]
    convolving = planned(convolve, images, loss=mean)
    assert said(convolving) == [False, True, False]
    assert convolving.reserved_margin > 0
    assert planned().reserved_margin == 0
    assert said(planned(lambda: nn.Embedding(10, 4), lambda: torch.tensor([1, 2]), loss=mean)) == [False, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device must be cpu, cuda or the name of a GPU; unknown device 'tpu'"),
        ({"accumulation_steps": 0}, "accumulation_steps must be at least 1, got 0"),
        ({"recipe": "bf16-masters"}, "did you mean 'bf16-master'"),
        ({"optimizer": "adamv"}, "did you mean 'adam"),
        ({"optimizer": "lbfgs"}, "lbfgs cannot be simulated: its step runs the model again"),
        ({"optimizer": lambda _: torch.optim.AdamW([])}, "the optimizer cannot be made: ValueError: optimizer got an"),
        ({"make": lambda: nn.Linear(3)}, "the model cannot be made: TypeError"),
        ({"make": lambda: "gpt2"}, "make_model must return a torch.nn.Module, got str"),
        ({"make": lambda: Tower().requires_grad_(False)}, "must have parameters that are trained"),
        ({"batch": lambda: {"ids": torch.zeros(3)}}, "refused the batch: TypeError.*unexpected keyword argument 'ids'"),
        ({"batch": lambda: {"features": torch.zeros(2, 7)}}, "refused the batch: RuntimeError"),
        ({"batch": lambda: 1 / 0}, "the batch cannot be made: ZeroDivisionError"),
        ({"make": lambda: nn.Linear(WIDTH, 2), "batch": lambda: torch.zeros(2, WIDTH)}, "Linear returned no loss"),
        ({"loss": lambda *_: 3.0}, "the loss must be one number in a tensor, got 3.0"),
        ({"loss": lambda *_: torch.zeros((), requires_grad=True) * 1}, "the loss never ran the model"),
    ],
)
def test_what_cannot_be_planned_is_said(settings: dict[str, Any], message: str) -> None:
    """Each refusal names what was wrong; none of them is another exception."""
    with pytest.raises(PlanError, match=message):
        planned(**settings)


def test_a_choice_by_activations_is_refused() -> None:
    """A model that looks at its activations to decide is told how to avoid that."""

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        value = model(**batch)
        return value if value > 0 else -value

    with pytest.raises(PlanError, match="depends on values that a simulation does not have"):
        planned(loss=loss)


def test_a_failed_plan_leaves_nothing_behind() -> None:
    """After a refusal in the middle of a step torch is as it was."""
    with pytest.raises(PlanError):
        planned(batch=lambda: {"features": torch.zeros(2, 7)})
    assert torch.ones(2).add(1).tolist() == [2.0, 2.0]
    assert planned().total_bytes > 0
