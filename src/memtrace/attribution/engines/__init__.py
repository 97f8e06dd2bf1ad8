"""Training engines: where those that shard, flatten or bucket keep their bytes. One file and one row each.

In come a model and its optimizers as the user handed them over. Out go claims on the ledger. Must not import an
engine's library: one that is not loaded trains nothing. A new engine is a file with a subclass of `Engine` and a
`find`, and its row in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from memtrace.attribution.engines import ddp, deepspeed, fsdp, fsdp1
from memtrace.attribution.engines.engine import Engine

Finder = Callable[[nn.Module, Sequence[object], Sequence[nn.Module]], Engine | None]
"""Returns the engine that trains this model, whose modules are these, with these optimizers, as the user handed them
over; None for another.

A finder imports nothing: an engine whose library is not loaded does not train anything.
"""

ENGINES: tuple[Finder, ...] = (
    deepspeed.find,
    fsdp.find,
    fsdp1.find,
    ddp.find,
)


def find_engines(
    model: nn.Module, optimizers: Sequence[object], modules: Sequence[nn.Module] | None = None
) -> list[Engine]:
    """Returns every engine at work between this model and these optimizers, wrapped or not; mostly none.

    Args:
        model: the module that is trained.
        optimizers: as the user has them.
        modules: the model's modules, where the caller has listed them already.
    """
    modules = tuple(model.modules()) if modules is None else modules
    found = (find(model, optimizers, modules) for find in ENGINES)
    return [engine for engine in found if engine is not None]


__all__ = ["ENGINES", "Engine", "Finder", "find_engines"]
