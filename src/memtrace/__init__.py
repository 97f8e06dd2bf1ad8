"""memtrace: what every byte of GPU memory is for in PyTorch training.

Names are resolved when they are first used: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

TYPE_CHECKING = False  # what `typing` would say: each process under `memtrace run` waits for all that is imported here
if TYPE_CHECKING:
    from typing import Any

    from memtrace.adapters.hf_trainer import MemTraceCallback
    from memtrace.adapters.lightning import MemTraceLightningCallback
    from memtrace.adapters.memory_tracer import MemoryTracer
    from memtrace.adapters.torch_optimizer import MemTraceOptimizer
    from memtrace.config import TracerConfig
    from memtrace.errors import ConfigError, MemTraceError
    from memtrace.gate.assertion import assert_peak, memory_plan
    from memtrace.planning.simulate import plan
    from memtrace.record.breakdown import Breakdown, StepRecord
    from memtrace.record.categories import Category, Moment

__version__ = "0.2.0"

_HOMES = {
    "Breakdown": "memtrace.record.breakdown",
    "Category": "memtrace.record.categories",
    "ConfigError": "memtrace.errors",
    "MemTraceCallback": "memtrace.adapters.hf_trainer",
    "MemTraceError": "memtrace.errors",
    "MemTraceLightningCallback": "memtrace.adapters.lightning",
    "MemTraceOptimizer": "memtrace.adapters.torch_optimizer",
    "MemoryTracer": "memtrace.adapters.memory_tracer",
    "Moment": "memtrace.record.categories",
    "StepRecord": "memtrace.record.breakdown",
    "TracerConfig": "memtrace.config",
    "assert_peak": "memtrace.gate.assertion",
    "memory_plan": "memtrace.gate.assertion",
    "plan": "memtrace.planning.simulate",
}

__all__ = [
    "Breakdown",
    "Category",
    "ConfigError",
    "MemTraceCallback",
    "MemTraceError",
    "MemTraceLightningCallback",
    "MemTraceOptimizer",
    "MemoryTracer",
    "Moment",
    "StepRecord",
    "TracerConfig",
    "assert_peak",
    "memory_plan",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'memtrace' has no attribute {name!r}")
    import importlib  # noqa: PLC0415 - nothing is loaded before a name is used

    from memtrace.errors import packages_of  # noqa: PLC0415

    with packages_of(f"memtrace.{name}"):
        value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
