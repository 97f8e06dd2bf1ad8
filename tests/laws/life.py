"""Which storages live when: the same run is played with and without memtrace, and both must tell the same story."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import transformers
from laws.families import FAMILIES, POSITIONS, SAMPLES, VOCABULARY, Family
from model_families import Batch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

Watch = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[Any]]
"""Makes what stands around a training: a tracer, or nothing."""


ORDINARY_STEPS = 2
"""So many steps are run before each way: the second is traced in any case, as the first one with optimizer state."""


def bare(*_: object) -> AbstractContextManager[None]:
    """Watches nothing."""
    return nullcontext()


class Storages(TorchDispatchMode):
    """Every storage that an operator makes while this is on, in order, each held weakly.

    Views and in-place operators make none. A storage of which a weak reference is kept gives its identity to no other.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []
        """The operator and the bytes of each."""
        self._weak: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors([*args, *(kwargs or {}).values()])}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors([result]):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                given.add(storage._cdata)
                self.made.append((str(func), storage.nbytes()))
                self._weak.append(StorageWeakRef(storage))
        return result

    def alive(self) -> tuple[str, ...]:
        """The storages that are still there: place in the order, operator and bytes."""
        return tuple(
            f"{place}: {operator}, {nbytes} bytes"
            for place, ((operator, nbytes), weak) in enumerate(zip(self.made, self._weak, strict=True))
            if not weak.expired()
        )


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among arguments or results of an operator: it has no other containers."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@dataclass(slots=True)
class Story:
    """What there is to compare of two runs."""

    alive: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """The storages alive at each moment that was looked at."""
    raised: list[str] = field(default_factory=list)
    made: list[tuple[str, int]] = field(default_factory=list)
    """Every storage that was made."""
    values: list[torch.Tensor] = field(default_factory=list)
    """Weights and optimizer state at the end."""


class Optimizer(torch.optim.SGD):
    """SGD that can be made to fail in the middle of its step, when state is there and nothing is updated yet."""

    fails: Callable[[str], None] = staticmethod(lambda place: None)

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._init_group(*args, **kwargs)
        self.fails("optimizer")
        return result


class Trip(torch.autograd.Function):
    """A place in the graph where a backward pass can be made to fail."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, fails: Callable[[str], None]) -> torch.Tensor:
        ctx.fails = fails
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.fails("backward")
        return gradient, None


class Run:
    """One training that a way to end a step is played on.

    Args:
        family: the model, its batches and its loss.
        watch: what stands around the training of each model.
    """

    masters = ()

    def __init__(self, family: Family, watch: Watch = bare) -> None:
        torch.manual_seed(0)
        self.family, self.watch = family, watch
        self.storages, self.story = Storages(), Story()
        self._failure: tuple[str, Callable[[], BaseException]] | None = None
        self.model = self.build()
        self.optimizer: torch.optim.Optimizer = self.optimizer_of(self.model)

    def build(self) -> nn.Module:
        """Returns a model of the family, in which the forward and the backward pass can be made to fail."""
        model = self.family.build().train()
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        middle = layers[len(layers) // 2]
        middle.register_forward_pre_hook(lambda *_: self._fails("forward"))
        middle.register_forward_hook(lambda _, args, output: Trip.apply(output, self._fails))
        return model

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns an optimizer of the model, which can be made to fail."""
        optimizer = Optimizer(model.parameters(), lr=1e-2, momentum=0.9)
        optimizer.fails = self._fails
        return optimizer

    def loss(self, model: nn.Module | None = None) -> torch.Tensor:
        """Returns the loss of a model on a new batch; nothing else of the forward pass is kept."""
        return self.family.loss(model or self.model, self.family.batch())

    def step(self, model: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Runs one step as most loops do, and looks at each moment of it."""
        loss = self.loss(model)
        self.look("after the forward pass")
        loss.backward()
        self.look("after the backward pass")
        (optimizer or self.optimizer).step()
        (optimizer or self.optimizer).zero_grad()
        self.look("after the step")

    def look(self, moment: str) -> None:
        """Notes which storages are alive, without garbage collection."""
        self.story.alive.append((moment, self.storages.alive()))

    @contextmanager
    def failing(self, place: str, error: Callable[[], BaseException]) -> Iterator[None]:
        """Makes the forward pass, the backward pass or the optimizer raise inside the block."""
        self._failure = place, error
        try:
            yield
        finally:
            self._failure = None

    def catching(self, *kinds: type[BaseException]) -> _Catching:
        """Catches such exceptions and keeps nothing of them but what they say."""
        return _Catching(self.story.raised, kinds)

    def _fails(self, place: str) -> None:
        if self._failure is not None and self._failure[0] == place:
            raise self._failure[1]()


class _Catching:
    def __init__(self, raised: list[str], kinds: tuple[type[BaseException], ...]) -> None:
        self._raised, self._kinds = raised, kinds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, self._kinds):
            return False
        self._raised.append(f"{type(error).__name__}: {error}")
        return True


def play(
    way: Callable[[Run], None], run: Run, around: Callable[[Run], AbstractContextManager[None]] = nullcontext
) -> Story:
    """Runs two steps, so that optimizer state is there, plays one way, ends the watch and returns the story.

    The garbage collector is off, so that nothing but the last reference to a storage frees it; it is asked at the end.
    """
    story = run.story
    with uncollected():
        with around(run):
            with (
                run.storages,
                run.catching(KeyboardInterrupt, RuntimeError, LookupError),
                run.watch(run.model, run.optimizer),
            ):
                for _ in range(ORDINARY_STEPS):
                    run.step()
                way(run)
            run.look("after the end")
        gc.collect()
        run.look("collected")
    state = [value for values in run.optimizer.state.values() for value in values.values()]
    story.values = [value.detach().clone() for value in (*run.model.parameters(), *run.model.buffers(), *state)]
    story.made = run.storages.made
    return story


@contextmanager
def uncollected() -> Iterator[None]:
    """Collects garbage, and none inside the block."""
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Perceptron(nn.Module):
    """The smallest model with something to save: three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Sigmoid(), nn.Linear(24, 16))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.body(features)


def _encoder() -> nn.Module:
    configuration = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=POSITIONS,
        attn_implementation="eager",  # as the others: it can be differentiated twice
    )
    return transformers.BertModel(configuration)


def _llama() -> nn.Module:
    configuration = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=POSITIONS,
        attn_implementation="eager",
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(configuration)


def _features() -> Batch:
    return {"features": torch.randn(SAMPLES, 16)}


LIVES = (
    Family(
        name="perceptron",
        build=Perceptron,
        batch=_features,
        loss=lambda model, batch: model(**batch).square().mean(),
    ),
    Family(
        name="encoder-with-unused-pooler",
        build=_encoder,
        batch=lambda: {"input_ids": torch.randint(0, VOCABULARY, (SAMPLES, POSITIONS))},
        loss=lambda model, batch: model(**batch).last_hidden_state.square().mean(),
    ),
    Family(name="llama", build=_llama, batch=FAMILIES[0].batch, loss=FAMILIES[0].loss),
)
"""The models of law 8."""
