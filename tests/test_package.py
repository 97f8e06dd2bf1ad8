"""The package as users import it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import memtrace

PUBLIC = [
    "Breakdown",
    "Category",
    "ConfigError",
    "MemTraceCallback",
    "MemTraceError",
    "MemTraceOptimizer",
    "MemoryTracer",
    "Moment",
    "StepRecord",
    "TracerConfig",
    "plan",
]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_public_names_are_the_documented_ones() -> None:
    """The contract's names are there, the list is sorted, and each name resolves to what it says."""
    assert set(PUBLIC) <= set(memtrace.__all__)
    assert memtrace.__all__ == sorted(memtrace.__all__)
    for name in memtrace.__all__:
        assert getattr(memtrace, name).__name__ == name
    assert set(memtrace.__all__) <= set(dir(memtrace))


def test_import_loads_nothing_heavy_and_starts_nothing() -> None:
    """Neither torch nor transformers nor the exporters are loaded by the import alone; no thread is started."""
    code = (
        "import sys, threading, memtrace;"
        "heavy = {'torch', 'transformers', 'prometheus_client', 'pynvml', 'rich', 'memtrace.tracer'};"
        "print(sorted(heavy & set(sys.modules)), threading.active_count())"
    )
    assert run(code) == "[] 1"


def test_words_load_without_torch() -> None:
    """Categories, records and settings can be read where torch is not wanted."""
    code = "import sys; from memtrace import Category, StepRecord, TracerConfig; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_callback_is_the_only_name_that_needs_transformers() -> None:
    """The optimizer wrapper and the tracer load torch, not transformers."""
    code = "import sys; from memtrace import MemoryTracer, MemTraceOptimizer; print('transformers' in sys.modules)"
    assert run(code) == "False"


def test_unknown_name_is_an_attribute_error() -> None:
    """As for any module."""
    with pytest.raises(AttributeError, match="no attribute 'MemTraceCallbak'"):
        _ = memtrace.MemTraceCallbak


def test_every_module_has_a_docstring_and_is_typed() -> None:
    """The first thing a reader sees says what the module is for; type checkers read the annotations."""
    root = Path(memtrace.__file__).parent
    assert (root / "py.typed").exists()
    for path in root.rglob("*.py"):
        name = ".".join(("memtrace", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
        if name != "memtrace.__main__" and not path.name.startswith("lightning"):
            assert importlib.import_module(name).__doc__, name
