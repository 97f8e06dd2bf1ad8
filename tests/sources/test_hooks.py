"""Hooks that come off together, and saved-tensor hooks beside those of the user."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from nothing_left import forbids_hooks, takes_no_hooks
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from memtrace.sources import autograd_torch_private, torch_private
from memtrace.sources.asides import FORBIDDING, HOOKLESS, Asides
from memtrace.sources.autograd_torch_private import has_saved_tensor_hooks
from memtrace.sources.gradient_hooks import HeardGradient, UnsavedHook, others_take_gradient, weakly
from memtrace.sources.hooks import Apart, HookSet
from memtrace.sources.optimizer_hooks import BeforeAnyStep
from memtrace.sources.saved_tensors import SavedTensorHooks


class _Noted(UnsavedHook):
    """Notes each gradient in a list."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def __call__(self, _: torch.Tensor) -> None:
        self._calls.append("heard")


class TestHookSet:
    """Registered through torch's public calls."""

    def test_the_module_is_watched_from_before_to_after(self) -> None:
        """Before all hooks of the user, with the arguments by position and by name; after its forward pass."""
        module, calls = nn.Linear(2, 2), []
        module.register_forward_pre_hook(lambda *_: calls.append("user"))
        with HookSet() as hooks:
            hooks.before_forward(module, lambda _, args, kwargs: calls.append((len(args), sorted(kwargs))))
            hooks.after_forward(module, lambda _, args, output: calls.append(tuple(output.shape)))
            module(input=torch.ones(1, 2))
        module(torch.ones(1, 2))
        assert calls == [(0, ["input"]), "user", (1, 2), "user"]

    def test_a_forward_pass_that_raises_ends_too(self) -> None:
        """The hook is called without an output."""
        module, calls = nn.Linear(2, 2), []
        with HookSet() as hooks:
            hooks.after_forward(module, lambda _, args, output: calls.append(output))
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                module(torch.ones(1, 3))
        assert calls == [None]

    def test_around_the_step(self) -> None:
        """Before and after each step of this optimizer."""
        optimizer, calls = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), []
        with HookSet() as hooks:
            hooks.around_step(optimizer, lambda *_: calls.append("before"), lambda *_: calls.append("after"))
            optimizer.step()
        optimizer.step()
        assert calls == ["before", "after"]

    def test_around_a_wrapper_and_what_it_wraps(self) -> None:
        """Its own step is one, whatever it steps inside, and so are all of its parts stepped by the loop; after a step
        that has raised, too. Always with the wrapper."""
        wrapper, *parts = (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(3))
        calls: list[str] = []

        def told(when: str) -> Any:
            return lambda optimizer, *_: calls.append(when if optimizer is wrapper else "another one")

        def steps_its_parts() -> float:
            for part in parts:
                part.step()
            return 0.0

        def raises() -> float:
            parts[0].step()
            raise LookupError

        with HookSet() as hooks:
            hooks.around_steps(wrapper, parts, told("before"), told("after"))
            steps_its_parts()
            assert [calls.pop(0) for _ in range(3)] == ["before", "before", "after"]
            wrapper.step(steps_its_parts)
            with pytest.raises(LookupError):
                wrapper.step(raises)
            wrapper.step()
            steps_its_parts()
        assert calls == ["before", "after", "before", "before", "after", "before", "before", "after"]

    def test_a_gradient_is_seen_before_hooks_take_it(self) -> None:
        """Those of the user keep their order, and are all that is there afterwards."""
        weight, calls = nn.Parameter(torch.ones(1)), []

        def takes(parameter: nn.Parameter) -> None:
            calls.append("takes")
            parameter.grad = None

        weight.register_post_accumulate_grad_hook(takes)
        handle = weight.register_post_accumulate_grad_hook(lambda _: calls.append("second"))
        with HookSet() as hooks:
            hooks.after_gradient([weight], lambda parameter: calls.append(parameter.grad.item()), first=True)
            (weight * 3).sum().backward()
        handle.remove()
        (weight * 3).sum().backward()
        assert calls == [3.0, "takes", "second", "takes"]

    def test_a_hook_of_memtrace_on_a_gradient_takes_nothing(self) -> None:
        """Who looks whether somebody takes gradients finds others' hooks, of both kinds, and not memtrace's own."""
        weight = nn.Parameter(torch.ones(2))
        with HookSet() as hooks:
            hooks.after_gradient([weight], weakly(self.hears), first=True)
            assert not others_take_gradient(weight)
            after = weight.register_post_accumulate_grad_hook(lambda _: None)
            assert others_take_gradient(weight)
            after.remove()
            weight.register_hook(lambda _: None)
            assert others_take_gradient(weight)

    def hears(self, _: torch.Tensor) -> None:
        """Stands for a method of memtrace that is told of a gradient."""

    def test_nothing_is_left_of_a_gradient_that_was_heard_of(self) -> None:
        """Those of the user are as before; torch calls nothing any more where there are none, which only it can tell:
        a dictionary put in place of the one that it calls is not asked."""
        weight, calls = nn.Parameter(torch.ones(1)), []
        handle = weight.register_hook(lambda _: calls.append("theirs"))
        heard = HeardGradient(weight, _Noted(calls))
        (weight * 3).sum().backward()
        heard.close(weight)
        (weight * 3).sum().backward()
        assert calls == ["theirs", "heard", "theirs"]
        assert len(weight._backward_hooks) == 1
        handle.remove()
        heard = HeardGradient(weight, _Noted(calls))
        asked = weight._backward_hooks
        heard.close(weight)
        heard.close(weight)
        assert weight._backward_hooks is None
        asked[0] = lambda _: calls.append("still asked")
        (weight * 3).sum().backward()
        assert calls == ["theirs", "heard", "theirs"]

    def test_a_gradient_is_heard_of_to_the_end_of_its_backward_pass(self) -> None:
        """Taken off by a hook that torch is calling, the hooks are left to it: what comes off later forgets them."""
        weight, calls = nn.Parameter(torch.ones(1)), []
        heard = HeardGradient(weight, _Noted(calls))

        def closes(_: torch.Tensor) -> None:
            handle.remove()
            heard.close(weight)

        handle = weight.register_hook(closes)
        (weight * 3).sum().backward()
        assert calls == ["heard"]
        assert not weight._backward_hooks
        assert weight._backward_hooks is not None
        heard.close(weight)
        assert weight._backward_hooks is None

    def test_a_parameter_that_is_heard_of_goes_to_another_process(self) -> None:
        """Without a warning of torch's, which has one for hooks that are lost."""
        weight = nn.Parameter(torch.ones(1))
        heard = HeardGradient(weight, _Noted([]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.utils.hooks.warn_if_has_hooks(weight)
            pickle.loads(ForkingPickler.dumps(weight))
        heard.close(weight)

    def test_after_each_gradient_that_can_come(self) -> None:
        """Of parameters that are trained; frozen ones and results have none accumulated."""
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
        model[0].weight.requires_grad_(False)
        seen: list[torch.Tensor] = []
        with HookSet() as hooks:
            hooks.after_gradient([*model.parameters(), model[1].weight * 2], seen.append)
            model(torch.ones(1, 2)).sum().backward()
        model(torch.ones(1, 2)).sum().backward()
        assert seen == [model[1].weight]

    def test_no_copy_of_a_module_takes_them_along(self) -> None:
        """A deep copy (an average of weights) and a pickle (a checkpoint of the whole module) are not watched."""
        module, calls = nn.Sequential(nn.Linear(2, 2)), []
        with HookSet() as hooks:
            hooks.before_forward(module, lambda *_: calls.append("before"))
            hooks.after_forward(module, lambda *_: calls.append("after"))
            saved = io.BytesIO()
            torch.save(module, saved)
            saved.seek(0)
            copies = [copy.deepcopy(module), torch.load(saved, weights_only=False)]
            for other in copies:
                assert torch.equal(other(torch.ones(1, 2)), module(torch.ones(1, 2)))
        assert calls == ["before", "after"] * 2

    def test_a_pickle_needs_no_memtrace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever loads the module need not have what it was trained with."""
        module = nn.Linear(2, 2)
        with HookSet() as hooks:
            hooks.before_forward(module, lambda *_: None)
            hooks.after_forward(module, lambda *_: None)
            pickled = pickle.dumps(module)
        for name in [name for name in sys.modules if name.split(".")[0] == "memtrace"]:
            monkeypatch.setitem(sys.modules, name, None)
        assert pickle.loads(pickled)(torch.ones(1, 2)).shape == (1, 2)

    def test_a_deep_copy_has_no_hook_left(self) -> None:
        """It is as a copy without memtrace, with the hooks of the user: it can be scripted, too."""
        module, calls = nn.Sequential(nn.Linear(2, 2)), []
        with HookSet() as hooks:
            hooks.before_forward(module, lambda *_: None)
            hooks.after_forward(module[0], lambda *_: None)
            other, _ = copy.deepcopy((module, module))
            torch.jit.script(other)
            assert has_hooks(module) == (True, False)
            module.register_forward_hook(lambda *_: calls.append("user"))
            copy.deepcopy(module)(torch.ones(1, 2))
        assert calls == ["user"]
        assert has_hooks(other) == has_hooks(other[0]) == (False, False)
        assert not other._forward_pre_hooks_with_kwargs
        assert not other[0]._forward_hooks_always_called

    def test_they_are_off_while_a_module_is_scripted(self) -> None:
        """Whichever module around or inside it: the result is the same, and afterwards they are heard as before, those
        that have come off meanwhile left out."""
        module, calls = nn.Sequential(nn.Linear(2, 2)), []
        bare = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
        compile_module = torch.jit._recursive.create_script_module
        with HookSet() as hooks, HookSet() as others:
            hooks.before_forward(module, lambda *_: calls.append("before"))
            hooks.after_forward(module, lambda *_: calls.append("after"))
            others.before_forward(module[0], lambda *_: calls.append("inside"))
            for scripted in (torch.jit.script(module), next(torch.jit.script(nn.Sequential(module)).children())):
                assert scripted.code == bare.code
                assert not scripted._forward_hooks
                assert not scripted._forward_pre_hooks
                scripted(torch.ones(1, 2))
            assert calls == []
            module(torch.ones(1, 2))
            assert calls == ["before", "inside", "after"]
            with pytest.raises(RuntimeError), hooks.aside():
                others.close()
                raise RuntimeError
            module(torch.ones(1, 2))
            with hooks.aside():
                hooks.close()
            module(torch.ones(1, 2))
        assert calls == ["before", "inside", "after", "before", "after"]
        assert torch.jit._recursive.create_script_module is compile_module

    def test_closed_in_reverse_and_once(self) -> None:
        """The last one first; closing again does nothing; a closed set can be used again."""
        calls: list[str] = []
        hooks = HookSet()
        hooks.callback(lambda: calls.append("first"))
        hooks.callback(lambda: calls.append("second"))
        hooks.close()
        hooks.close()
        assert calls == ["second", "first"]
        hooks.callback(lambda: calls.append("third"))
        hooks.close()
        assert calls[-1] == "third"


def has_hooks(module: nn.Module) -> tuple[bool, bool]:
    """Returns whether there are any before and after a forward pass."""
    return bool(module._forward_pre_hooks), bool(module._forward_hooks)


class Boxes:
    """Saved-tensor hooks of a user: what they pack must come back through them."""

    def __init__(self) -> None:
        self.packed = self.unpacked = 0

    def __call__(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: torch.Tensor) -> Any:
        self.packed += 1
        return [tensor.clone()]

    def unpack(self, box: Any) -> torch.Tensor:
        self.unpacked += 1
        assert isinstance(box, list)
        return box[0]


class Watch:
    """A pair of memtrace's and what it has seen."""

    def __init__(self) -> None:
        self.packed: list[torch.Tensor] = []
        self.unpacked = 0
        self.kept: list[object] = []
        self.pair = SavedTensorHooks(self.on_pack, self.on_unpack, self.kept.append)

    def on_pack(self, tensor: torch.Tensor) -> None:
        self.packed.append(tensor)

    def on_unpack(self, tensor: torch.Tensor) -> None:
        self.unpacked += 1


WEIGHT = torch.ones(3, requires_grad=True)


def saved_once() -> torch.Tensor:
    """Saves one tensor for backward."""
    return WEIGHT.exp()


class TestSavedTensorHooks:
    """One stack for each thread. torch applies the innermost pair, and tells it; else it is looked for (2.6)."""

    @pytest.fixture(autouse=True, params=["told", "looked for"])
    def innermost(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param == "looked for":
            monkeypatch.setattr(autograd_torch_private, "_innermost_hooks", None)

    def test_it_stays_on_until_it_is_taken_off(self) -> None:
        """From one call to a later one; pushing or popping twice does nothing."""
        watch = Watch()
        watch.pair.push()
        watch.pair.push()
        assert watch.pair.is_on
        saved_once().sum().backward()
        assert (len(watch.packed), watch.unpacked) == (1, 1)
        assert watch.pair.pop()
        assert watch.pair.pop()
        assert not watch.pair.is_on
        assert not has_saved_tensor_hooks()
        saved_once()
        assert len(watch.packed) == 1

    def test_it_sees_the_tensors_themselves(self) -> None:
        """And gives back what it was given: results are the same bits."""
        watch = Watch()
        watch.pair.push()
        result = saved_once()
        watch.pair.pop()
        assert watch.packed[0].data_ptr() == result.data_ptr()

    def test_another_tensor_may_take_the_place(self) -> None:
        """Where `on_pack` returns one."""
        stand_in = torch.full((3,), 2.0)
        pair = SavedTensorHooks(lambda tensor: stand_in, lambda tensor: None, lambda kept: None)
        pair.push()
        x = torch.zeros(3, requires_grad=True)
        result = x.exp()
        pair.pop()
        result.sum().backward()
        assert torch.equal(x.grad, stand_in)

    def test_it_hears_what_the_backward_pass_asks_for_until_it_has_heard_enough(self) -> None:
        """Nothing more of any tensor, whichever pair saved it, until it is told to listen again."""
        asked: list[torch.Tensor] = []

        def on_unpack(tensor: torch.Tensor) -> bool:
            asked.append(tensor)
            return len(asked) == 2

        pair = SavedTensorHooks(lambda tensor: None, on_unpack, lambda kept: None)
        pair.push()
        first = saved_once().exp().exp()
        pair.pop()
        pair.push()
        second = saved_once()
        pair.pop()
        first.sum().backward()
        assert len(asked) == 2
        pair.listening = True
        second.sum().backward()
        assert len(asked) == 3

    def test_hooks_of_the_user_below_are_called(self) -> None:
        """Both see the tensor; the pair says that it covers them."""
        watch, boxes = Watch(), Boxes()
        with boxes():
            watch.pair.push()
            assert watch.pair.covers_user_hooks
            result = saved_once()
            assert watch.pair.pop()
        result.sum().backward()
        assert (boxes.packed, boxes.unpacked) == (1, 1)
        assert (len(watch.packed), watch.unpacked) == (1, 1)
        ((kept,),) = watch.kept
        assert torch.equal(kept, watch.packed[0])
        assert kept is not watch.packed[0]

    def test_what_was_packed_comes_back_when_the_pair_covers_others(self) -> None:
        """Taken off, put on over other hooks: each tensor returns through the hooks that packed it."""
        watch, first, second = Watch(), Boxes(), Boxes()
        results = []
        for boxes in (first, second, None):
            if boxes is None:
                watch.pair.push()
                results.append(saved_once())
                watch.pair.pop()
                continue
            with boxes():
                watch.pair.push()
                results.append(saved_once())
                watch.pair.pop()
        assert not watch.pair.covers_user_hooks
        for result in results:
            result.sum().backward()
        assert (first.unpacked, second.unpacked, watch.unpacked) == (1, 1, 3)

    def test_hooks_of_the_user_above_are_theirs_alone(self) -> None:
        """torch calls the innermost pair only, and their block takes off their own."""
        watch, boxes = Watch(), Boxes()
        watch.pair.push()
        with boxes():
            assert not watch.pair.pop(), "it is not the innermost one"
            saved_once()
        assert (boxes.packed, len(watch.packed)) == (1, 0)
        saved_once()
        assert len(watch.packed) == 1
        assert watch.pair.pop()

    def test_another_thread_cannot_take_it_off(self) -> None:
        """Each thread has its own stack."""
        watch, outcome = Watch(), []
        watch.pair.push()
        other = threading.Thread(target=lambda: outcome.append(watch.pair.pop()))
        other.start()
        other.join()
        assert outcome == [True], "it has none"
        assert watch.pair.is_on
        assert watch.pair.pop()

    def test_they_come_off_with_the_last_tensor_that_they_have_kept(self) -> None:
        """After the forward pass: one that led to nothing ends them. Within it more may be saved."""
        watch = Watch()
        watch.pair.push()
        loss = saved_once()
        watch.packed.clear()
        del loss
        assert watch.pair.is_on, "the forward pass goes on"
        loss = saved_once()
        watch.packed.clear()
        watch.pair.forward_ended(loss)
        assert watch.pair.is_on
        del loss
        assert not watch.pair.is_on
        watch.pair.push()
        assert watch.pair.is_on, "the next forward pass puts them on again"
        watch.pair.forward_ended(())
        assert watch.pair.pop()

    def test_where_the_user_has_forbidden_them(self) -> None:
        """Nothing is put on, and nothing raises."""
        watch = Watch()
        with disable_saved_tensors_hooks("not here"):
            watch.pair.push()
            assert not watch.pair.is_on
            saved_once()
        assert watch.packed == []

    def test_inside_a_backward_pass(self) -> None:
        """torch puts the stack back behind each node: neither pushing nor popping would last, so neither is done."""
        watch, late = Watch(), Watch()
        outcome: list[bool] = []

        def inside(gradient: torch.Tensor) -> None:
            outcome.append(watch.pair.pop())
            late.pair.push()
            outcome.append(late.pair.is_on)

        watch.pair.push()
        x = torch.ones(2, requires_grad=True)
        x.register_hook(inside)
        x.exp().sum().backward()
        assert outcome == [False, False]
        assert watch.pair.is_on
        assert watch.pair.pop()
        assert not has_saved_tensor_hooks()

    def test_of_several_hooks_of_the_user_none_is_covered_that_nobody_knows(self) -> None:
        """Where torch does not tell the innermost one, ours stay off, and theirs see what they saw before."""
        watch, outer, inner = Watch(), Boxes(), Boxes()
        with outer(), inner():
            watch.pair.push()
            assert watch.pair.is_on == (autograd_torch_private._innermost_hooks is not None)
            saved_once()
            assert watch.pair.pop()
        assert (outer.packed, inner.packed) == (0, 1)

    def test_what_was_put_aside_does_not_come_back_on_another_thread(self) -> None:
        """As where the last one of two compilations at once ends there: that thread has no hooks, and this one may have
        them again."""
        watch, outcome = Watch(), []
        watch.pair.push()
        aside = FORBIDDING._around()
        aside.__enter__()
        assert not has_saved_tensor_hooks()

        def ends() -> None:
            aside.__exit__(None, None, None)
            outcome.append(has_saved_tensor_hooks())

        in_a_thread(ends)
        assert outcome == [False]
        assert not watch.pair.is_on
        watch.pair.push()
        saved_once()
        assert len(watch.packed) == 1
        assert watch.pair.pop()


@pytest.mark.parametrize("asides", [FORBIDDING, HOOKLESS], ids=["forbidden", "hookless"])
def test_hooks_of_several_threads_go_on_and_off_at_once(asides: Asides) -> None:
    """Each is known while it is on, and what has told of others is torch's own function in the end."""
    before = takes_no_hooks(), forbids_hooks()
    missed: list[object] = []

    class Hooks:
        def aside(self) -> AbstractContextManager[None]:
            return nullcontext()

    def work() -> None:
        for _ in range(500):
            hooks = Hooks()
            leaves = asides.subscribe(hooks.aside)
            known = [reference() for reference in [*asides._subscribers.values()]]
            missed.extend([] if hooks.aside in known else [hooks])
            leaves()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert missed == []
    assert (takes_no_hooks(), forbids_hooks()) == before


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_storage_that_only_c_refers_to_outlives_nobody() -> None:
    """A weak reference to it is followed as often as one likes; the storage goes with what has saved it."""
    weight = torch.ones(3, requires_grad=True)
    result = weight.exp()
    reference = weakref.ref(result.untyped_storage())
    kept = result.sum()
    del result
    found = [torch_private.alive(reference) for _ in range(3)]
    assert {None if one is None else one.nbytes() for one in found} == {12}
    del found
    gc.collect()
    assert torch_private.alive(reference) is not None
    del kept
    assert torch_private.alive(reference) is None


def test_a_storage_that_others_of_c_refer_to_weakly_is_gone_all_the_same() -> None:
    """Up to torch 2.8 at least its Python object is still there, and must not be touched."""
    tensor = torch.ones(3)
    reference, theirs = weakref.ref(tensor.untyped_storage()), StorageWeakRef(tensor.untyped_storage())
    del tensor
    assert theirs.expired()
    assert torch_private.alive(reference) is None


def test_a_hook_that_is_taken_off_by_the_one_before_it() -> None:
    """Torch calls it once more, without keyword arguments: it does nothing, and the call goes on."""
    model, first, second, heard = nn.Linear(2, 2), HookSet(), HookSet(), []
    second.before_forward(model, lambda module, args, kwargs: heard.append("pre"))
    second.after_forward(model, lambda module, args, output: heard.append("post"))
    first.before_forward(model, lambda *_: second.close())
    assert model(torch.ones(1, 2)).shape == (1, 2)
    assert heard == []
    first.close()


@pytest.mark.parametrize("closes", range(6))
def test_hooks_on_steps_that_are_taken_off_inside_a_step(closes: int) -> None:
    """By themselves, as after a fault, or by hooks around them: no step fails, none is called, one at most is left,
    that does nothing and refers to nothing."""
    weight, heard = nn.Parameter(torch.ones(1)), []
    optimizer, hooks = torch.optim.SGD([weight]), HookSet()

    def hook(place: int) -> Callable[..., None]:
        def called(*_: object) -> None:
            heard.append(place)
            if place == closes:
                hooks.close()

        return called

    optimizer.register_step_pre_hook(hook(0))
    optimizer.register_step_post_hook(hook(3))
    before, after = hook(1), hook(4)
    hooks.around_step(optimizer, before, after)
    optimizer.register_step_pre_hook(hook(2))
    last = optimizer.register_step_post_hook(hook(5))
    optimizer.step()
    heard.clear()
    references = weakref.ref(before), weakref.ref(after)
    del before, after
    for _ in range(2):
        optimizer.step()
    assert heard == [0, 2, 3, 5] * 2
    assert [reference() for reference in references] == [None, None]
    assert len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks) <= 5
    last.remove()
    optimizer.step()
    assert len(optimizer._optimizer_step_post_hooks) == 1


class Stepped:
    """Hears of steps, and goes on to what it was given."""

    def __init__(self, then: Callable[[object], None] = lambda _: None) -> None:
        self.heard: list[object] = []
        self._then = then

    def hears(self, stepped: object) -> None:
        self.heard.append(stepped)
        self._then(stepped)


def test_a_hook_on_all_steps_goes_with_its_object() -> None:
    """At once where nothing else refers to it: torch holds the hook weakly. Also inside of a step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    gone = Stepped()
    BeforeAnyStep(gone.hears)
    behind = [Stepped()]
    first = Stepped(lambda _: behind.clear())
    before = BeforeAnyStep(first.hears)
    BeforeAnyStep(behind[0].hears)
    heard = gone.heard
    del gone
    optimizer.step()
    optimizer.step()
    assert heard == []
    assert first.heard == [optimizer] * 2
    before.take_off()


def test_a_hook_on_all_steps_that_is_taken_off_while_another_thread_steps() -> None:
    """In its own call, after one of another thread has come and gone: no step fails, and nothing is left in the end."""
    first, second = (torch.optim.SGD([nn.Parameter(torch.ones(1))]) for _ in range(2))

    def called(stepped: object) -> None:
        if stepped is first:
            in_a_thread(second.step)
            before.take_off()

    one, other = Stepped(called), Stepped()
    before, behind = BeforeAnyStep(one.hears), BeforeAnyStep(other.hears)
    first.step()
    behind.take_off()
    second.step()
    first.step()
    assert one.heard == [first, second]


def test_what_is_apart_from_graphs_is_another_function_for_the_compiler() -> None:
    """A call goes to the one with its arguments, `func` is the other."""
    called: list[tuple[object, ...]] = []
    hook = Apart(lambda *args: called.append(args), 1, in_graphs=print)
    hook(2)
    assert called == [(1, 2)]
    assert (hook.func, hook.args) == (print, ())
