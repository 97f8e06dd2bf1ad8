"""Before and after every test: no thread of memtrace, no hook and no profiler is left, and `sys.exit` is Python's, and
what takes no hooks and what forbids them torch's."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

PATIENCE_SECONDS = 5.0
"""How long a thread that has been told to end may take to do so."""


def memtrace_threads() -> list[str]:
    """Returns the names of memtrace's threads that are alive; those that are just ending may end."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("memtrace")]
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    return [thread.name for thread in threads if thread.is_alive()]


def global_hooks_of_torch() -> dict[str, Any]:
    """Returns every process-wide hook registry of torch that is in use; nothing where torch is not loaded."""
    loaded = [sys.modules.get(name) for name in ("torch.nn.modules.module", "torch.optim.optimizer")]
    registries = {name: value for module in loaded if module is not None for name, value in vars(module).items()}
    return {
        name: dict(value)
        for name, value in registries.items()
        if name.startswith("_global") and isinstance(value, Mapping) and value
    }


def recorders_of_torch() -> dict[str, Any]:
    """Returns what records or intercepts on this thread: saved-tensor hooks, a profiler, dispatch modes."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "autograd"):
        return {}
    from memtrace.sources.autograd_torch_private import has_saved_tensor_hooks

    found = {
        "saved-tensor hooks": has_saved_tensor_hooks(),
        "profiler": torch.autograd._profiler_enabled(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }
    return {name: value for name, value in found.items() if value}


def takes_no_hooks() -> tuple[Any, ...]:
    """Returns what of torch scripts modules and captures their graphs; None in place of what is not loaded."""
    graphs = [
        getattr(sys.modules.get(name), "make_graphed_callables", None) for name in ("torch.cuda", "torch.cuda.graphs")
    ]
    return getattr(sys.modules.get("torch.jit._recursive"), "create_script_module", None), *graphs


def forbids_hooks() -> Any:
    """Returns what of torch forbids saved-tensor hooks, and who hears of its compiler."""
    compiler = getattr(sys.modules.get("torch._dynamo.callback"), "callback_handler", None)
    hear = [] if compiler is None else [*compiler.start_callbacks, *compiler.end_callbacks]
    forbids: Any = getattr(sys.modules.get("torch.autograd.graph"), "disable_saved_tensors_hooks", None)
    return forbids and [cell.cell_contents for cell in forbids.__closure__], hear


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Looks before and after each test."""
    hooks, leave, hookless, forbids = global_hooks_of_torch(), sys.exit, takes_no_hooks(), forbids_hooks()
    assert (memtrace_threads(), recorders_of_torch()) == ([], {})
    yield
    assert (memtrace_threads(), recorders_of_torch()) == ([], {})
    assert global_hooks_of_torch() == hooks
    if sys.exit is not leave or takes_no_hooks() != hookless:
        gc.collect()  # a tracer with a fault of its own could not say that it ends: it does when it is collected
    assert sys.exit is leave
    assert hookless[0] is None or takes_no_hooks() == hookless
    assert forbids[0] is None or forbids_hooks() == forbids
