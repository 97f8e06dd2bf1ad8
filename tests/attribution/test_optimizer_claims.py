"""What optimizers hold: state by component for every optimizer of torch and for unknown ones, and master weights."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from memtrace.attribution.ledger import Ledger
from memtrace.attribution.models.contents import claim_model
from memtrace.attribution.optimizers.claims import claim_optimizers
from memtrace.attribution.optimizers.finding import HandedOver, find_optimizers
from memtrace.attribution.scan import Scan
from memtrace.errors import ConfigError
from memtrace.record.categories import Category

CPU = torch.device("cpu")
SHIPPED = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "foreach": False}],
    "Adam": [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}],
    "AdamW": [{}, {"amsgrad": True}],
    "RMSprop": [{}, {"momentum": 0.9, "centered": True}],
    "LBFGS": [{"max_iter": 4, "history_size": 3}],
}
CASES = [(name, settings) for name in SHIPPED for settings in SETTINGS.get(name, [{}])]


class Matrices(nn.Module):
    """Matrices without biases: every optimizer of torch can train them, Muon as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(rows)))


def trained(name: str, settings: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer of torch after three steps."""
    torch.manual_seed(0)
    model: nn.Module = nn.EmbeddingBag(9, 4, sparse=True) if name == "SparseAdam" else Matrices()
    optimizer = SHIPPED[name](model.parameters(), **settings)
    batch = torch.randint(0, 9, (3, 2)) if name == "SparseAdam" else torch.randn(3, 6)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        if name == "LBFGS":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return model, optimizer


def claimed(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What the ledger says after model and optimizer were claimed, without the weights."""
    ledger = Ledger(CPU)
    claim_optimizers([optimizer], claim_model(model, ledger), ledger)
    return {"/".join(tag): size for tag, size in ledger.totals().items() if tag.category is not Category.WEIGHTS}


def tensors_in(value: Any) -> Iterable[torch.Tensor]:
    """Every tensor in dictionaries and sequences: all that torch's optimizers use."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_every_state_of_torchs_optimizers(name: str, settings: dict[str, Any]) -> None:
    """Each storage once, as optimizer state, under the names that the optimizer gives; nothing as a master copy."""
    model, optimizer = trained(name, settings)
    found = claimed(model, optimizer)
    assert sum(found.values()) == storage_bytes(tensors_in(dict(optimizer.state)))
    names = {key for state in optimizer.state.values() for key in state}
    assert {key.split("/")[0] for key in found} <= {"optimizer_state"}
    assert {key.split("/")[1] for key in found} <= names


def test_the_table_is_all_that_torch_ships() -> None:
    """A new optimizer in torch is in the table by itself; these have been there for years."""
    assert {"SGD", "Adam", "AdamW", "Adagrad", "Adafactor", "LBFGS", "SparseAdam"} <= set(SHIPPED)


def test_adamw_by_component() -> None:
    """Two moments of four bytes a parameter, and a step counter of four bytes a tensor."""
    found = claimed(*trained("AdamW", {}))
    moments = (30 + 20) * 4
    assert found == {
        "optimizer_state/exp_avg/float32": moments,
        "optimizer_state/exp_avg_sq/float32": moments,
        "optimizer_state/step/float32": 8,
    }


def test_sgd_without_momentum_has_no_state() -> None:
    """Nothing is made up."""
    assert claimed(*trained("SGD", {})) == {}


@dataclass
class Moments:
    """State in a dataclass."""

    mean: torch.Tensor
    history: list[torch.Tensor]


@dataclass
class Half:
    """A dataclass with a field that has no value yet."""

    mean: torch.Tensor
    later: torch.Tensor = field(init=False)


class Closed(dict):  # type: ignore[type-arg]
    """A mapping that cannot be gone through."""

    def items(self) -> Any:
        raise RuntimeError("closed")

    values = __iter__ = items


class Scale:
    """State in an object."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.name = "row"
        self.again = self


def with_state(state: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """An optimizer that nobody knows, with this state for its one parameter."""
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = state
    return model, optimizer


def floats(count: int) -> torch.Tensor:
    return torch.zeros(count)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"a": {"b": {"c": floats(3)}}}, {"a.b.c": 12}),
        ({"a": [floats(1), (floats(2), [floats(3)])]}, {"a": 24}),
        ({"a": {0: floats(1), 1: floats(2)}}, {"a": 12}),
        ({"m": Moments(floats(2), [floats(1), floats(1)])}, {"m.mean": 8, "m.history": 8}),
        ({"scale": Scale(floats(5))}, {"scale.values": 20}),
        ({"half": Half(floats(3))}, {"half.mean": 12}),
        ({"closed": Closed(), "other": floats(2)}, {"other": 8}),
        ({"order": range(10**15), "bits": array("b", bytes(9)), "other": floats(2)}, {"other": 8}),
        ({"step": 7, "name": "text", "rate": 0.5, "none": None, "call": floats}, {}),
    ],
)
def test_unknown_nested_state(state: Any, expected: dict[str, int]) -> None:
    """Named by the path of names to it, whatever it is kept in; what is no tensor is skipped, and cycles end."""
    found = claimed(*with_state(state))
    assert found == {f"optimizer_state/{path}/float32": size for path, size in expected.items()}


def test_state_that_is_a_weight_stays_a_weight() -> None:
    """An optimizer that keeps the parameters themselves in its state."""
    model, optimizer = with_state({})
    optimizer.state[model.weight] = {"kept": model.weight, "view": model.weight[0]}
    assert claimed(model, optimizer) == {}


class TestMasterWeights:
    """Told by role."""

    def test_copies_of_higher_precision_in_a_parameter_group(self) -> None:
        """The optimizer holds float32 copies of a bfloat16 model."""
        model = Matrices().to(torch.bfloat16)
        copies = [parameter.detach().float() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(copies, lr=0.1)
        assert find_optimizers(optimizer, model).stepping == [optimizer]
        assert claimed(model, optimizer) == {"master_weights//float32": 50 * 4}

    def test_one_flat_copy_of_all_parameters(self) -> None:
        """With padding, as engines make it."""
        model = Matrices().to(torch.float16)
        optimizer = torch.optim.SGD([torch.zeros(50 + 14)], lr=0.1)
        assert find_optimizers(optimizer, model).stepping == [optimizer]
        assert claimed(model, optimizer) == {"master_weights//float32": 64 * 4}

    @pytest.mark.parametrize("name", ["master_param", "fp32_copy", "float32_param", "master"])
    def test_copies_that_the_optimizer_makes_itself(self, name: str) -> None:
        """A state whose name says so; the moments beside it stay state."""
        model, optimizer = with_state({name: floats(16), "exp_avg": floats(16)})
        assert claimed(model, optimizer) == {"master_weights//float32": 64, "optimizer_state/exp_avg/float32": 64}

    def test_parameters_of_another_module_are_weights(self) -> None:
        """A criterion with parameters of its own, trained by the same optimizer."""
        model, temperature = Matrices(), nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([*model.parameters(), temperature], lr=0.1)
        ledger = Ledger(CPU)
        claim_optimizers([optimizer], claim_model(model, ledger), ledger)
        assert ledger.role_of(temperature) is Category.WEIGHTS

    def test_a_copy_of_the_same_precision_is_no_master(self) -> None:
        """An average of the weights has their shape and their precision."""
        model = Matrices()
        average = nn.Parameter(model.first.weight.detach().clone())
        optimizer = torch.optim.SGD([*model.parameters(), average], lr=0.1)
        ledger = Ledger(CPU)
        claim_optimizers([optimizer], claim_model(model, ledger), ledger)
        assert ledger.role_of(average) is Category.WEIGHTS


class Wrapper:
    """Holds what it wraps under a name, and is no torch optimizer."""

    def __init__(self, name: str, held: Any) -> None:
        setattr(self, name, held)

    def step(self) -> None:
        """What is held is stepped by whoever has it."""


class LayerWise(torch.optim.Optimizer):
    """A dummy with a tensor of its own beside the real optimizers, one for each parameter."""

    def __init__(self, optimizer_dict: dict[Any, torch.optim.Optimizer]) -> None:
        self.optimizer_dict = optimizer_dict
        super().__init__([torch.zeros(1)], {})


class Slow(torch.optim.Optimizer):
    """A torch optimizer that steps another one, and keeps a state beside it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([parameter for group in inner.param_groups for parameter in group["params"]], {})
        self.base_optimizer = inner

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base_optimizer.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("slow", torch.zeros_like(parameter))


def own(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer for each parameter."""
    return [torch.optim.AdamW([parameter]) for parameter in model.parameters()]


class TestWrappers:
    """The real optimizers are found in whatever holds them."""

    @pytest.mark.parametrize(
        "name",
        ["optimizer", "base", "optim", "base_optimizer", "inner_optimizer", "_optimizer"],
    )
    def test_one_held_under_a_name(self, name: str) -> None:
        """Twice over."""
        model = Matrices()
        bare = torch.optim.SGD(model.parameters(), lr=0.1)
        assert find_optimizers(Wrapper(name, Wrapper("optimizer", bare)), model).stepping == [bare]

    @pytest.mark.parametrize("name", ["optimizers", "chained_optimizers"])
    def test_several_held_in_a_list(self, name: str) -> None:
        """In their order, each once."""
        model = Matrices()
        several = own(model)
        assert find_optimizers(Wrapper(name, [*several, several[0]]), model).stepping == several

    @pytest.mark.parametrize("container", [list, tuple, lambda several: dict(enumerate(several)), lambda s: [s[:1], s]])
    def test_containers(self, container: Callable[[Any], Any]) -> None:
        """Lists, tuples and dictionaries, nested too."""
        model = Matrices()
        several = own(model)
        assert find_optimizers(container(several), model).stepping == several

    def test_one_for_each_parameter_beside_a_dummy(self) -> None:
        """As Trainer's layer-wise GaLore and APOLLO have it: the dummy never steps, and holds no parameter."""
        model = Matrices()
        several = own(model)
        found = find_optimizers(LayerWise(dict(zip(model.parameters(), several, strict=True))), model)
        assert list(found.stepping) == several
        assert set(map(id, several)) <= set(map(id, found.holding))

    def test_a_torch_optimizer_around_another_one(self) -> None:
        """Its own step is the one that counts; both states are claimed."""
        model = Matrices()
        outer = Slow(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        model(torch.ones(3, 6)).sum().backward()
        outer.step()
        found = find_optimizers(outer, model)
        assert found.stepping == [outer]
        ledger = Ledger(CPU)
        Scan(model, outer).claim_persistent(ledger)
        states = {
            tag.component: size for tag, size in ledger.totals().items() if tag.category.value == "optimizer_state"
        }
        assert states == {"momentum_buffer": 200, "slow": 200}

    def test_schedule_free(self) -> None:
        """Its wrapper is no torch optimizer, and holds the base under a name of its own."""
        from schedulefree import ScheduleFreeWrapper

        model = Matrices()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        assert find_optimizers(ScheduleFreeWrapper(base), model).stepping == [base]

    def test_whatever_a_wrapper_is_called_and_holds_besides(self) -> None:
        """Containers that cannot be gone through, attributes that raise, what only looks as if it could be stepped."""

        class Odd(Wrapper):
            @property
            def param_groups(self) -> Any:
                raise RuntimeError("not yet")

        model = Matrices()
        bare = torch.optim.SGD(model.parameters(), lr=0.1)
        wrapper = Odd("whatever", [{"deep": bare}])
        wrapper.closed, wrapper.order, wrapper.itself = Closed(), range(10**15), [wrapper]  # type: ignore[attr-defined]
        found = find_optimizers(wrapper, model)
        assert found.stepping == [bare]
        assert found.holding == [bare]
        Scan(model, wrapper).claim_persistent(Ledger(CPU))

    def test_what_is_kept_in_attributes_and_groups(self) -> None:
        """Has the name of the attribute, or of a master copy; parameters and state stay what they are."""
        model = Matrices()
        bare = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9)
        bare.param_groups[0]["state"] = {model.first.weight: {"ema": floats(7)}}
        wrapper = Wrapper("inner", bare)
        wrapper.slow = [[floats(3)], {model.first.weight: floats(4)}]  # type: ignore[attr-defined]
        wrapper.fp32_copies, wrapper.parameters = (floats(5),), list(model.parameters())  # type: ignore[attr-defined]
        ledger = Ledger(CPU)
        Scan(model, wrapper).claim_persistent(ledger)
        found = {"/".join(tag[:2]): size for tag, size in ledger.totals().items()}
        assert found == {
            "weights/trainable": 200,
            "optimizer_state/lr": 4,
            "optimizer_state/ema": 28,
            "optimizer_state/slow": 28,
            "master_weights/": 20,
        }

    def test_wrappers_in_a_circle(self) -> None:
        """Each is looked into once."""
        model = Matrices()
        first = Wrapper("optimizer", None)
        first.optimizer = Wrapper("base", first)
        assert find_optimizers(first, model).stepping == []


class TestWrongOptimizers:
    """What the user is told."""

    @pytest.mark.parametrize(
        "parameters",
        [
            lambda: [nn.Parameter(torch.zeros(5, 6))],
            lambda: [torch.zeros(5, 6, dtype=torch.bfloat16)],
            lambda: [torch.zeros(7, 7, dtype=torch.float64)],
        ],
    )
    def test_an_optimizer_of_another_model(self, parameters: Callable[[], list[torch.Tensor]]) -> None:
        """Shapes and precisions that cannot be copies of this model's."""
        with pytest.raises(ConfigError, match=r"none of its 1 parameters belongs to the given Matrices.*another model"):
            Scan(Matrices(), torch.optim.SGD(parameters(), lr=0.1))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (lambda: nn.Linear(2, 2), r"must be a torch\.optim\.Optimizer, got Linear"),
            (lambda: Wrapper("optimizer", None), r"must be a torch\.optim\.Optimizer, got Wrapper"),
            (list, "at least one optimizer, got none"),
            (lambda: None, "at least one optimizer, got none"),
        ],
    )
    def test_what_is_no_optimizer(self, given: Callable[[], Any], message: str) -> None:
        """Say what was given and what was expected."""
        with pytest.raises(ConfigError, match=message):
            Scan(Matrices(), given())

    def test_a_wrapper_that_wraps_itself(self) -> None:
        """Ends with the same message instead of turning for ever."""

        class Loop:
            @property
            def optimizer(self) -> Loop:
                return self

        with pytest.raises(ConfigError, match="got Loop"):
            Scan(Matrices(), Loop())

    def test_what_a_framework_hands_over_is_no_error(self, caplog: pytest.LogCaptureFixture) -> None:
        """One line says what is odd, and what can be followed is."""
        model = Matrices()
        good, stranger = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD([torch.zeros(1)], lr=0.1)
        scan = Scan(model, HandedOver([good, stranger, Wrapper("optimizer", None)]))
        assert scan.optimizers == [good]
        (record,) = caplog.records
        assert "none of its 1 parameters" in record.message
        assert "got Wrapper" in record.message

    def test_nothing_that_can_be_followed(self) -> None:
        """Weights are claimed all the same."""
        model, ledger = Matrices(), Ledger(CPU)
        scan = Scan(model, HandedOver([]))
        scan.claim_persistent(ledger)
        assert sum(ledger.totals().values()) == 200
        assert not scan.has_state
