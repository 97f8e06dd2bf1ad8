"""Forms of loops: what is called in place of the model, and whose turn it is to step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, ROWS = 16, 8

Losses = Iterator[torch.Tensor]


class Network(nn.Module):
    """A network with methods beside `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(rows))

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(rows)).square().mean()

    def fused_loss(self, rows: torch.Tensor) -> torch.Tensor:
        """The head's weight without the head, as fused losses over logits do it."""
        return F.linear(self.body(rows), self.head.weight, self.head.bias).square().mean()

    def layer_by_layer(self, rows: torch.Tensor) -> torch.Tensor:
        for layer in self.body:
            rows = layer(rows)
        return self.head(rows).square().mean()


class Agent(nn.Module):
    """A module that cannot be called: its networks are."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def evaluate_actions(self, rows: torch.Tensor) -> torch.Tensor:
        return (self.actor(rows).tanh() * self.critic(rows).tanh()).mean()


class System(nn.Module):
    """A module around the network that is trained, with a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def training_step(self, rows: torch.Tensor) -> torch.Tensor:
        return self.network(rows).square().mean()


def rows() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH)


def update(loss: torch.Tensor, *optimizers: torch.optim.Optimizer) -> torch.Tensor:
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


@dataclass(slots=True)
class Training:
    """A model, and the optimizers that memtrace is handed with it."""

    model: nn.Module
    optimizers: list[torch.optim.Optimizer]

    def adam(self, *modules: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([parameter for module in modules for parameter in module.parameters()])
        self.optimizers.append(optimizer)
        return optimizer


def one(model: nn.Module) -> Training:
    """One model, one optimizer."""
    training = Training(model, [])
    training.adam(model)
    return training


def pair() -> Training:
    """A generator and a discriminator in one container, with an optimizer each."""
    training = Training(nn.ModuleList([Network(), Network()]), [])
    for network in training.model.children():
        training.adam(network)
    return training


def by(method: str) -> Callable[[Training], Losses]:
    """Trains by another method than `forward`."""

    def run(training: Training) -> Losses:
        while True:
            yield update(getattr(training.model, method)(rows()), *training.optimizers)

    return run


def accumulates(training: Training) -> Losses:
    while True:
        training.model.loss(rows()).backward()
        yield update(training.model.loss(rows()), *training.optimizers)


def evaluates_by_forward(training: Training) -> Losses:
    """Evaluation calls the model, training another method."""
    while True:
        yield update(training.model.loss(rows()), *training.optimizers)
        with torch.no_grad():
            training.model(rows())


def by_forward_and_method(training: Training) -> Losses:
    while True:
        yield update(training.model(rows()).square().mean(), *training.optimizers)
        yield update(training.model.loss(rows()), *training.optimizers)


def by_parts_in_turns(training: Training) -> Losses:
    """Each step calls another module inside the model."""
    while True:
        yield update(training.model.body(rows()).square().mean(), *training.optimizers)
        yield update(training.model.head(rows()).square().mean(), *training.optimizers)


def checkpointed_whole(training: Training) -> Losses:
    while True:
        given = rows().requires_grad_()
        yield update(checkpoint(training.model, given, use_reentrant=True).square().mean(), *training.optimizers)


def adversarial(training: Training, critic_steps: int = 1) -> Losses:
    """A discriminator and a generator in turns: one step of the training is a cycle."""
    (generator, discriminator), (of_generator, of_discriminator) = training.model, training.optimizers
    while True:
        for _ in range(critic_steps):
            fake = generator(rows())
            loss = discriminator(rows()).mean() - discriminator(fake.detach()).mean()
            update(loss, of_discriminator)
        yield update(discriminator(fake).mean(), of_generator)


def five_to_one(training: Training) -> Losses:
    return adversarial(training, critic_steps=5)


def iteration_about(training: Training) -> Losses:
    """One network in each iteration: two iterations are a cycle."""
    while True:
        for network, optimizer in zip(training.model, training.optimizers, strict=True):
            loss = update(network(rows()).square().mean(), optimizer)
        yield loss


def together(training: Training) -> Losses:
    """Both in one loss, each with its optimizer."""
    first, second = training.model
    while True:
        yield update((first(rows()) * second(rows())).mean(), *training.optimizers)


def one_idles(training: Training) -> Losses:
    """Only the second one is trained."""
    while True:
        yield update(training.model[1](rows()).square().mean(), training.optimizers[1])


def one_is_replaced(training: Training) -> Losses:
    """The optimizer of the first one is made anew after a cycle, and memtrace does not hear of it."""
    yield next(together(training))
    kept = training.optimizers[0]
    training.optimizers[0] = torch.optim.AdamW(training.model[0].parameters())
    yield from together(training)
    del kept


def one_joins(training: Training) -> Losses:
    """The first one is trained from the 41st iteration on."""
    yield from islice(one_idles(training), 40)
    yield from iteration_about(training)


def one_seldom(training: Training) -> Losses:
    """The first one is trained every 20th iteration, and the second one in all others."""
    while True:
        yield from islice(one_idles(training), 19)
        yield update(training.model[0](rows()).square().mean(), training.optimizers[0])


@dataclass(frozen=True, slots=True)
class Form:
    """A form of a loop; its generator yields the last loss of each iteration."""

    name: str
    build: Callable[[], Training]
    run: Callable[[Training], Losses]
    iterations: int = 4
    steps: int = 4
    """Steps of the training in so many iterations."""
    untraced: Sequence[int] = ()
    """Steps that cannot be traced: what is called is not known yet."""
    unclaimed: int = 1024
    """Bytes that nobody claims, at most: the losses, and a batch that the loop keeps."""

    def __str__(self) -> str:
        return self.name


def on_one(name: str, run: Callable[[Training], Losses], *, untraced: Sequence[int] = (1,), steps: int = 4) -> Form:
    return Form(name, lambda: one(Network()), run, steps, steps, untraced)


def on_pair(name: str, run: Callable[[Training], Losses], iterations: int = 4, steps: int = 4) -> Form:
    return Form(name, pair, run, iterations, steps)


FORMS: Sequence[Form] = (
    on_one("a method beside forward", by("loss")),
    on_one("a fused loss on the body", by("fused_loss")),
    on_one("layer by layer", by("layer_by_layer")),
    Form("a module without forward", lambda: one(Agent()), by("evaluate_actions")),
    Form("a step of the module around it", lambda: one(System()), by("training_step"), untraced=(1,)),
    on_one("a method, accumulating", accumulates),
    on_one("a method, evaluated by forward", evaluates_by_forward),
    on_one("a method and forward in turns", by_forward_and_method, untraced=(2,), steps=10),
    on_one("parts in turns", by_parts_in_turns, steps=10),
    # The checkpoint keeps the state of the random numbers.
    replace(on_one("whole in a reentrant checkpoint", checkpointed_whole), unclaimed=6_000),
    on_pair("generator and discriminator", adversarial),
    on_pair("five critic steps to one", five_to_one),
    on_pair("one network an iteration", iteration_about),
    on_pair("both in one loss", together),
    on_pair("one optimizer idles", one_idles, 20, 5),
    # The new optimizer's state is nobody's: memtrace does not know it.
    replace(on_pair("one optimizer is replaced", one_is_replaced, 21, 6), unclaimed=12_000),
    on_pair("one network joins later", one_joins, 50, 35),
    on_pair("one network seldom", one_seldom, 60, 42),
)
