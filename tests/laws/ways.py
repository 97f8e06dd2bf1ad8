"""The ways in which a step can end or be left, written as loops write them, without memtrace. Two ordinary steps
have gone before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from threading import Thread

import torch
from laws.families import POSITIONS, VOCABULARY, Family
from laws.life import LIVES, Run
from laws.ways_of_graphs import (
    a_hook_that_replaces,
    gradients_of_gradients,
    graph_kept_and_run_twice,
    kept_for_longer,
    part_of_the_graph,
)
from laws.ways_of_updates import FORMS, steps_of_another_form


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


def of_the_user() -> LookupError:
    return LookupError("of the user")


PLACES = ("forward", "backward", "optimizer", "loop")


def every_step(run: Run) -> None:
    for _ in range(3):
        run.step()


def failed_step(run: Run, place: str, error: Callable[[], BaseException]) -> None:
    """The loop is left in the middle of a step."""
    with run.failing(place, error):
        loss = run.loss()
        if place == "loop":
            raise error()
        loss.backward()
        run.optimizer.step()


def failed_and_tried_again(run: Run, place: str, error: Callable[[], BaseException]) -> None:
    """As `auto_find_batch_size` does it: caught outside of the step, and begun anew."""
    with run.catching(type(error())):
        failed_step(run, place, error)
    run.look("caught")
    run.optimizer.zero_grad()
    run.look("begun anew")
    run.step()
    run.step()


def second_micro_batch_failed(run: Run, place: str) -> None:
    """The first micro batch of an accumulated step is done."""
    with run.catching(torch.OutOfMemoryError):
        run.loss().backward()
        with run.failing(place, out_of_memory):
            run.loss().backward()
    run.look("caught")
    run.optimizer.zero_grad()
    run.step()


def discarded_loss(run: Run) -> None:
    loss = run.loss()
    run.look("held")
    del loss
    run.look("discarded")
    run.step()


def one_loss_of_two(run: Run) -> None:
    """Two forward passes in a step, of which one is used."""
    for _ in range(2):
        unused, used = run.loss(), run.loss()
        run.look("both")
        used.backward()
        run.look("one is done")
        del unused, used
        run.look("none")
        run.optimizer.step()
        run.optimizer.zero_grad()
    run.step()


def not_finite_and_skipped(run: Run) -> None:
    for scale in (1.0, float("nan"), float("inf"), 1.0):
        loss = run.loss() * scale
        if not loss.isfinite():
            run.look("not finite")
            run.optimizer.zero_grad()
            continue
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.look("step")
    del loss
    run.look("done")


def evaluation_without_no_grad(run: Run) -> None:
    run.model.eval()
    seen = [run.loss().item() for _ in range(3)]
    run.look("evaluated")
    run.model.train()
    run.step()
    run.loss().backward()
    run.model.eval()
    seen.append(run.loss().item())  # before the optimizer's step
    run.look("evaluated inside a step")
    run.model.train()
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step()


def evaluation_with_no_grad(run: Run) -> None:
    loss = run.loss()
    with torch.no_grad():
        run.loss()
    run.look("evaluated inside a step")
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    with torch.inference_mode():
        run.loss()
    run.step()


def rollouts(run: Run) -> None:
    """Forward passes with gradients whose results are kept for a while, as scores are."""
    scores = [run.loss() for _ in range(3)]
    run.look("kept")
    values = [score.detach() for score in scores]
    scores.clear()
    run.look("detached")
    run.step()
    del values
    run.look("gone")


def generation(run: Run, inside: bool) -> None:
    """transformers' `generate`, between steps or in one, as it is and with gradients."""
    prompt = torch.randint(0, VOCABULARY, (1, POSITIONS // 2))
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    for generate in (run.model.generate, partial(type(run.model).generate.__wrapped__, run.model)):
        loss = run.loss() if inside else None
        found = generate(prompt, **settings)
        run.look("generated")
        assert found.shape[1] > prompt.shape[1]
        del found
        if loss is not None:
            loss.backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.step()


def another_model_in_turns(run: Run, watched: bool) -> None:
    """Steps of two models one after the other, then one inside the other's."""
    other = run.build()
    optimizer = run.optimizer_of(other)
    with (run.watch if watched else _unwatched)(other, optimizer):
        for _ in range(2):
            run.step()
            run.step(other, optimizer)
        loss = run.loss()
        run.step(other, optimizer)
        loss.backward()
        run.step(other, optimizer)
        run.optimizer.step()
        run.optimizer.zero_grad()
        del loss
        run.step()


def _unwatched(*_: object) -> torch.autograd.set_grad_enabled:
    return torch.enable_grad()


def another_model_after_an_interrupt(run: Run) -> None:
    """A cell of a notebook is interrupted, and the next one trains another model."""
    with run.catching(KeyboardInterrupt):
        loss = run.loss()
        raise KeyboardInterrupt
    del loss
    run.look("interrupted")
    other = run.build()
    optimizer = run.optimizer_of(other)
    for _ in range(3):
        run.step(other, optimizer)
    del other, optimizer
    run.look("the other model is gone")


def another_model_after_an_interrupt_that_keeps_the_loss(run: Run) -> None:
    """As a notebook keeps what a cell has made. The other model trains for long, and the first one goes on."""
    with run.catching(KeyboardInterrupt):
        loss = run.loss()
        raise KeyboardInterrupt
    other = run.build()
    optimizer = run.optimizer_of(other)
    for _ in range(20):
        run.step(other, optimizer)
    del loss, other, optimizer
    run.look("all of that is gone")
    run.optimizer.zero_grad()
    run.step()


def optimizer_replaced(run: Run, dropped: bool) -> None:
    """A second stage with an optimizer that memtrace has not been given: no step ends any more. The first one is kept,
    or goes with its state."""
    first, run.optimizer = run.optimizer, run.optimizer_of(run.model)
    if dropped:
        del first
    run.look("replaced")
    for _ in range(4):
        run.step()


def optimizer_idles(run: Run) -> None:
    """Gradients that are not finite: the scaler skips the optimizer's step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for turn in range(4):
        loss = run.loss()
        scaler.scale(loss).backward()
        if turn % 2:
            next(p for p in run.model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        run.look("turn")
        del loss
        run.look("loss gone")


def gradients_never_used(run: Run) -> None:
    """Backward passes without a step of the optimizer: gradients are read and dropped."""
    for _ in range(4):
        run.loss().backward()
        run.look("gradients")
        run.model.zero_grad()
        run.look("dropped")
    run.step()


def forward_in_a_thread(run: Run) -> None:
    """The model is called in a thread that ends; the backward pass runs in the loop's."""
    found: list[torch.Tensor] = []

    def forward() -> None:
        with run.storages:
            found.append(run.loss())

    for _ in range(2):
        _in_a_thread(forward)
        run.look("after the forward pass")
        found.pop().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.look("after the step")
    _in_a_thread(forward)
    found.clear()
    run.look("discarded")
    run.step()


def step_in_a_thread(run: Run) -> None:
    """Whole steps in a thread, which ends inside one."""

    def work() -> None:
        with run.storages, run.catching(LookupError):
            run.step()
            loss = run.loss()
            run.look("in the thread")
            del loss
            raise of_the_user()

    run.step()
    _in_a_thread(work)
    run.look("the thread is gone")
    run.step()


def _in_a_thread(function: Callable[[], None]) -> None:
    thread = Thread(target=function)
    thread.start()
    thread.join()


@dataclass(frozen=True, slots=True)
class Way:
    """One row of the table."""

    name: str
    play: Callable[[Run], None]
    families: tuple[Family, ...] = LIVES
    ends: bool = True
    """Whether the watched optimizer can step again afterwards."""

    def __str__(self) -> str:
        return self.name


def _ways() -> Iterator[Way]:
    for place in PLACES:
        yield Way(f"out-of-memory-{place}", partial(failed_and_tried_again, place=place, error=out_of_memory))
        yield Way(f"interrupt-{place}", partial(failed_step, place=place, error=KeyboardInterrupt))
        yield Way(f"exception-{place}", partial(failed_step, place=place, error=of_the_user))
    for place in ("forward", "backward"):
        yield Way(f"second-micro-batch-{place}", partial(second_micro_batch_failed, place=place))
    for inside in (False, True):
        yield Way(f"generation-{'in-a' if inside else 'between'}-step", partial(generation, inside=inside), LIVES[2:])
    for watched in (False, True):
        name = "two-models-" + ("two-tracers" if watched else "one-tracer")
        yield Way(name, partial(another_model_in_turns, watched=watched))
    for play in (
        every_step,
        discarded_loss,
        one_loss_of_two,
        not_finite_and_skipped,
        evaluation_without_no_grad,
        evaluation_with_no_grad,
        rollouts,
        another_model_after_an_interrupt,
        another_model_after_an_interrupt_that_keeps_the_loss,
        optimizer_idles,
        gradients_never_used,
        graph_kept_and_run_twice,
        gradients_of_gradients,
        part_of_the_graph,
        forward_in_a_thread,
        step_in_a_thread,
        kept_for_longer,
        a_hook_that_replaces,
    ):
        yield Way(play.__name__.replace("_", "-"), play)
    for form in FORMS:
        name = "updates-by-" + form.__name__.replace("_", "-")
        yield Way(name, partial(steps_of_another_form, form=form), LIVES[:2])
    for dropped in (False, True):
        name = "optimizer-replaced" + ("-and-dropped" if dropped else "")
        yield Way(name, partial(optimizer_replaced, dropped=dropped), ends=False)


WAYS = tuple(_ways())
