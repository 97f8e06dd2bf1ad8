"""The package as users import it."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import memtrace

PUBLIC = [
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
        "heavy = {'torch', 'transformers', 'prometheus_client', 'pynvml', 'rich', 'memtrace.tracing.tracer'};"
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


@pytest.mark.parametrize(
    ("package", "code", "what"),
    [
        ("torch", "from memtrace import MemoryTracer", "memtrace.MemoryTracer needs torch"),
        ("torch", "from memtrace import plan", "memtrace.plan needs torch"),
        (
            "lightning",
            "from memtrace import MemTraceLightningCallback",
            "memtrace.MemTraceLightningCallback needs lightning",
        ),
        ("transformers", "from memtrace import MemTraceCallback", "memtrace.MemTraceCallback needs transformers"),
        ("torch", "from memtrace.cli import main; main(['plan', '--config', 'x.json'])", "memtrace plan needs torch"),
        ("plotly", "from memtrace.cli import main; main(['report', '.'])", "memtrace report needs plotly"),
    ],
)
def test_what_is_missing_is_named(package: str, code: str, what: str) -> None:
    """With what to install; a command says it in a line."""
    child = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{package!r}] = None; {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    last = child.stderr.splitlines()[-1]
    assert f"{what}, which is not installed: pip install " in last
    assert "Traceback" not in child.stderr or "main(" not in code


def test_what_needs_no_torch_runs_without_it(tmp_path: Path) -> None:
    """Plans from a parameter count, tables, comparisons and reports of what a run has left."""
    recorded = str(Path(__file__).parent / "fixtures" / "gpu" / "llama-3-8b")
    planned = str(tmp_path / "plan.json")
    code = (
        "import sys; from contextlib import redirect_stdout;"
        "sys.modules['torch'] = sys.modules['transformers'] = None;"
        "from memtrace.cli import main;"
        "\nwith redirect_stdout(open({planned!r}, 'w')): main(['plan', '--params', '8e9', '--json'])"
        "\nprint([main(['show', {recorded!r}]), main(['compare', {planned!r}, {recorded!r}]),"
        " main(['watch', '--once', {recorded!r}]), main(['report', {recorded!r}, '-o', {page!r}])])"
    ).format(planned=planned, recorded=recorded, page=str(tmp_path / "report.html"))
    assert run(code).splitlines()[-1] == "[0, 0, 0, 0]"


def test_torch_is_not_asked_for() -> None:
    """pip would replace a vendor's build, such as 2.11.0a0: the one that is there is taken."""
    asked_for = [line for line in metadata.requires("torch-memtrace") or () if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in asked_for) == ["nvidia-ml-py", "prometheus-client", "rich"]


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
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name
        if name != "memtrace.__main__" and not path.name.startswith(("lightning", "axolotl")):
            importlib.import_module(name)
