"""Settings in axolotl's YAML. Axolotl itself is not installed here: `make frameworks` runs it with the plugin."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin's module with a base class in the place of axolotl's, which is not installed here."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "memtrace.adapters.axolotl", raising=False)
    import memtrace.adapters.axolotl

    yield memtrace.adapters.axolotl
    sys.modules.pop("memtrace.adapters.axolotl", None)


def test_the_section_of_axolotl_has_the_settings(axolotl: Any) -> None:
    """They reach the callback, None too; without a section it has the defaults."""
    plugin = axolotl.MemTracePlugin()
    module, _, name = plugin.get_input_args().rpartition(".")
    section = getattr(sys.modules[module], name)(memtrace={"port": None, "trace_every": 7})
    (callback,) = plugin.add_callbacks_post_trainer(SimpleNamespace(memtrace=section.memtrace), None)
    assert (callback._config.port, callback._config.trace_every) == (None, 7)
    (callback,) = plugin.add_callbacks_post_trainer(SimpleNamespace(memtrace=None), None)
    assert callback._config.trace_every is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trace_evry": 7}, "unknown setting 'trace_evry': did you mean 'trace_every'"),
        ({"port": 99999}, "port must be 0..65535, got 99999"),
        ([1], "valid dictionary"),
    ],
)
def test_a_wrong_section_of_axolotl_is_refused(axolotl: Any, settings: object, message: str) -> None:
    """When axolotl reads its configuration, with the place and what is wrong."""
    with pytest.raises(ValidationError, match=rf"(?s)memtrace.*{message}"):
        axolotl.MemTraceSection(memtrace=settings)
