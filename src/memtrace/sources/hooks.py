"""Every hook that memtrace installs, on one stack, so that all of them can be taken off again."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from memtrace.sources import autograd_torch_private, torch_private
from memtrace.sources.asides import HOOKLESS
from memtrace.sources.optimizer_hooks import BeforeAnyStep, leave_steps


class HookSet:
    """Hooks that come off together.

    Use as a context manager or call `close()`; closing twice does nothing, unless Ctrl-C has come into the first. Only
    public registration calls of torch are used, so that what was there before is there afterwards. Hooks are left out
    of compiled regions: torch's compiler runs them outside the graph. Those on modules are off while torch makes
    something of a module that must have none: see `asides.HOOKLESS`.
    """

    def __init__(self) -> None:
        self._offs: list[Callable[[], object]] = []
        """Each takes something off; a second call of it does nothing."""
        self._on_modules: list[_OnModule] = []
        self._compiling = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes every hook, the last one first. Where Ctrl-C keeps one from coming off, the next call removes it."""
        self._on_modules.clear()
        with ExitStack() as closing:  # each of them, whatever the others raise
            for off in self._offs:
                closing.callback(off)
        self._offs.clear()

    def before_forward(
        self, module: nn.Module, hook: Callable[..., None], *, prepend: bool = True, breaks_graphs: bool = True
    ) -> None:
        """Calls `hook(module, args, kwargs)` before each forward of the module, before or after all other hooks.

        Args:
            module: whose forward passes are told.
            hook: what is called.
            prepend: whether before all other hooks.
            breaks_graphs: inside a graph of torch's compiler it is heard at the price of a break, or not at all. No
                matter with an `Apart`, which says what the compiler sees.
        """
        found, register = _module_hook(module, hook, breaks_graphs), _registering(module).register_forward_pre_hook
        self._put_on(module, lambda to: register(to, found, with_kwargs=True, prepend=prepend))

    def after_forward(self, module: nn.Module, hook: Callable[..., None], *, breaks_graphs: bool = True) -> None:
        """Calls `hook(module, args, output)` after each forward of the module, also of one that raised.

        Args:
            module: whose forward passes are told.
            hook: what is called.
            breaks_graphs: see `before_forward`.
        """
        found, register = _module_hook(module, hook, breaks_graphs), _registering(module).register_forward_hook
        self._put_on(module, lambda to: register(to, found, always_call=True))

    def _put_on(self, module: nn.Module, register: Callable[[nn.Module], RemovableHandle]) -> None:
        if not self._on_modules:
            self._offs.append(HOOKLESS.subscribe(self.aside))
        hook = _OnModule(module, register)
        self._on_modules.append(hook)
        self._offs.append(hook.take_off)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Takes the hooks on modules off, and puts those on again that have not been removed meanwhile."""
        self._compiling += 1
        if self._compiling == 1:
            for hook in self._on_modules:
                hook.take_off()
        try:
            yield
        finally:
            self._compiling -= 1
            if not self._compiling:
                for hook in self._on_modules:
                    hook.put_on()

    def around_step(
        self, optimizer: torch.optim.Optimizer, before: Callable[..., None], after: Callable[..., None]
    ) -> None:
        """Calls `before` and `after`, each with (stepped, args, kwargs), around each step of the optimizer.

        The first argument is whose `step` was called: the optimizer, or a wrapper with the same hooks.
        """
        handles = [optimizer.register_step_pre_hook(before)]
        self._offs.append(partial(leave_steps, handles))  # also where the optimizer refuses the second
        handles.append(optimizer.register_step_post_hook(after))

    def around_steps(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Sequence[torch.optim.Optimizer],
        before: Callable[..., None],
        after: Callable[..., None],
    ) -> None:
        """Calls `before` and `after` as `around_step` does, also where the loop steps what the optimizer wraps.

        All of its parts, each stepped once, are one step of it. Inside of its own step theirs are not told of. Where
        there are parts, the first argument is always the optimizer.
        """
        if not parts:
            self.around_step(optimizer, before, after)
            return
        whole = weakref.ref(optimizer)
        at_work: list[int] = []
        left = {*map(id, parts)}

        def begins(one: int, _: object, *args: object) -> None:
            if one in at_work:  # it has raised the last time
                del at_work[at_work.index(one) :]
            at_work.append(one)
            if len(at_work) == 1:
                before(whole(), *args)

        def ends(one: int, _: object, *args: object) -> None:
            if one in at_work:
                del at_work[at_work.index(one) :]
            if not at_work:
                left.discard(one)
                if one == owner or not left:
                    left.update(each)
                    after(whole(), *args)

        each, owner = frozenset(left), id(optimizer)
        for one in (optimizer, *parts):
            self.around_step(one, partial(begins, id(one)), partial(ends, id(one)))

    def before_any_step(self, method: Callable[[object], None]) -> None:
        """Calls a bound method, as long as its object is there, with each optimizer of the process before its steps."""
        self._offs.append(BeforeAnyStep(method).take_off)

    def after_gradient(
        self, parameters: Iterable[nn.Parameter], hook: Callable[[torch.Tensor], None], *, first: bool = False
    ) -> None:
        """Calls `hook(parameter)` each time a gradient was accumulated into `.grad`.

        Args:
            parameters: those whose gradients are told.
            hook: what is called.
            first: whether before all other hooks of it, which may take the gradient.
        """
        handles: list[RemovableHandle] = []
        # One for all: a traced step has them on for that step alone.
        self._offs.append(partial(_remove, handles))
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                handles.append(handle)
                if first:
                    autograd_torch_private.call_first(parameter, handle.id)

    def callback(self, function: Callable[[], Any]) -> None:
        """Calls `function`, whose second call does nothing, when the set is closed."""
        self._offs.append(function)


def _registering(module: nn.Module) -> type[nn.Module]:
    """Returns the class whose methods put hooks on a module: a scripted one calls hooks, and refuses to take any."""
    return nn.Module if isinstance(module, torch.jit.ScriptModule) else type(module)


class _OnModule:
    """A hook on a module, which is held weakly: on it until it is taken off.

    Args:
        module: what it is on.
        register: puts it on a module.
    """

    def __init__(self, module: nn.Module, register: Callable[[nn.Module], RemovableHandle]) -> None:
        self._module, self._register = weakref.ref(module), register
        self._handle = register(module)

    def take_off(self) -> None:
        """Takes it off; a second call does nothing."""
        self._handle.remove()

    def put_on(self) -> None:
        """Puts it on again, in front of others or behind them as before, unless the module is gone.

        With the number that it had: a graph that must be whole is compiled anew for another one, which has a limit.
        """
        module = self._module()
        if module is None:
            return
        number, self._handle = self._handle.id, self._register(module)
        new = self._handle.id
        hooks: Any = self._handle.hooks_dict_ref()
        is_first = next(iter(hooks)) == new
        for known in (hooks, *(reference() for reference in self._handle.extra_dict_ref)):
            if new in known:
                known[number] = known.pop(new)
        if is_first:
            hooks.move_to_end(number, last=False)
        self._handle.id = number


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()


def outside_graphs(hook: Callable[..., None]) -> Callable[..., None]:
    """Returns the hook as torch's compiler leaves it, and what it calls, out of a graph, where the compiler is loaded.

    Traced into the graph of a compiled module, a hook would run once instead of each time, and change the graph. The
    compiler is not loaded for that, which takes seconds: whoever has made an optimizer of torch has loaded it.
    """
    if "torch._dynamo" not in sys.modules or torch_private.is_left_out_of_graphs(hook):
        return hook
    outside: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return outside


def unless_whole(hook: Callable[..., None], may_break: bool) -> Callable[..., None]:
    """Returns the hook as it goes on a module: heard outside of graphs, and nowhere in one that must be whole.

    Where a graph may be in parts, the compiler breaks it at a hook that may, and calls it in between. A caller compiled
    with `fullgraph=True` allows none, `torch.export` runs the module on tensors without memory, and `torch.jit.trace`
    on shapes that are tensors: there it does nothing. Nor does it where a hook before it has taken it off in the same
    call: torch calls it all the same, and has forgotten that it takes keyword arguments.
    """
    outside, must_be_whole, is_traced = outside_graphs(hook), torch_private.one_graph, torch_private.is_jit_tracing
    is_compiling, breaks_graphs = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling

    def heard(module: nn.Module, args: Any, *rest: Any) -> None:
        if is_compiling():
            if may_break and breaks_graphs() and not must_be_whole():
                outside(module, args, *rest)
        elif rest and not is_traced():
            outside(module, args, *rest)

    torch_private.not_compiled_alone(heard)
    return heard


class Apart(partial[None]):
    """A function that is called outside of graphs alone: torch's compiler sees another one in its place.

    The compiler asks a partial for its `func`, and a call does not. So what runs in each step need not ask whether the
    compiler is at work, and may be what the compiler cannot see into.

    Args:
        function: what is called.
        args: its first arguments.
        in_graphs: what the compiler sees; called without those.
    """

    called: Callable[..., Any]
    """What a call calls: the function, with its first arguments where there are some."""
    in_graphs: Callable[..., None]

    def __new__(cls, function: Callable[..., Any], /, *args: Any, in_graphs: Callable[..., None]) -> Self:
        """Returns it with the attribute: no keyword argument of the function."""
        torch_private.not_compiled_alone(function)
        made = super().__new__(cls, function, *args)
        made.called, made.in_graphs = partial(function, *args) if args else function, in_graphs
        return made

    @property
    def func(self) -> Callable[..., None]:
        """What the compiler sees."""
        return self.in_graphs

    @property
    def args(self) -> tuple[()]:
        """None: they are not for what the compiler sees."""
        return ()


def _module_hook(module: nn.Module, hook: Callable[..., None], breaks_graphs: bool) -> Callable[..., None]:
    if isinstance(hook, Apart):
        found = _ModuleHook(hook.called, in_graphs=hook.in_graphs)
    else:
        heard = unless_whole(hook, breaks_graphs)
        found = _ModuleHook(heard, in_graphs=heard)
    found.module = weakref.ref(module)
    return found


class _ModuleHook(Apart):
    """A hook on a module, which no copy and no pickle of the module takes along.

    A copy is another module, that nobody has asked to be watched, and whoever loads a pickle need not have memtrace. A
    deep copy has no such hook once it is made, and a pickle has something in its place that does nothing.
    """

    module: weakref.ref[nn.Module]

    @property
    def __name__(self) -> str:
        """Raises: only `torch.jit.script` asks for the name of a hook, where it could not be taken off before."""
        raise AttributeError(
            "torch.jit.script compiles the hooks of a module, and those of memtrace cannot be compiled: detach "
            "memtrace from the module before (tracer.detach() or optimizer.close())"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        inert = _inert()
        original = self.module()
        copied = None if original is None else memo.get(id(original))
        if copied is not None:
            removal = _Removal(copied, inert)
            memo[id(removal)] = removal
        return inert

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def _inert() -> Callable[..., Any]:
    """Returns a hook that does nothing."""
    return nullcontext().__exit__


class _Removal:
    """Takes a hook off a copy that is being made, once it is: when the memory of the copying is let go."""

    def __init__(self, copied: nn.Module, hook: Callable[..., Any]) -> None:
        self._copied, self._hook = weakref.ref(copied), hook

    def __del__(self) -> None:
        copied = self._copied()
        if copied is not None:
            torch_private.remove_module_hook(copied, self._hook)
