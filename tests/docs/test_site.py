"""The documentation as a site: built without a warning, complete, and right in a browser."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from browser import files, page
from documented import ROOT

import memtrace

PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the built site; a warning is an error."""
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return directory


def words_of(html: str) -> str:
    """Returns the text of a page, with one space for all space."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_every_page_is_in_the_navigation(site: Path) -> None:
    """Each page of docs/, and the one of integrations/, is reached from the first."""
    start = (site / "index.html").read_text()
    for name in PAGES:
        assert f'href="{name}.html"' in start or name == "index", name
    assert 'href="integrations/index.html"' in start or 'href="integrations/"' in start


def documented_names() -> list[str]:
    """Returns what the reference asks to be rendered."""
    return re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


def test_the_whole_contract_is_in_the_reference(site: Path) -> None:
    """Every public name has a section, with what its docstring and those of its fields say first."""
    html = (site / "api.html").read_text()
    words = words_of(html).replace("¶", "").replace(" ", "")
    names = documented_names()
    assert {f"memtrace.{name}" for name in memtrace.__all__} <= set(names)
    for name in names:
        module, _, attribute = name.rpartition(".")
        thing = getattr(importlib.import_module(module), attribute)
        assert f'id="{name}"' in html, name
        said = inspect.getdoc(thing) or ""
        assert compact(said.partition("\n\n")[0]) in words, name
        for member in dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ():
            if name != "memtrace.TracerConfig":  # whose fields have a page, settings.md
                assert f'id="{name}.{member.name}"' in html, (name, member.name)
    for member in ("latest", "history", "trace_next", "report_failure", "log_path", "url", "snapshot"):
        assert f'id="memtrace.MemoryTracer.{member}"' in html


def compact(text: str) -> str:
    """Returns a docstring's paragraph as the page shows it, without space: marks of code are gone."""
    return "".join(text.replace("`", "").split())


def test_docstrings_are_read_as_they_are_written(site: Path) -> None:
    """Sections of Google's style became lists, so none is left as text."""
    words = words_of((site / "api.html").read_text())
    assert "Raises:" in words
    assert "Parameters:" in words
    for heading in ("Args:", "Yields: "):
        assert heading not in words
    assert "```" not in words


@pytest.mark.parametrize(
    ("name", "heading"), [("index", "memtrace"), ("api", "Python"), ("out-of-memory", "My run is")]
)
def test_pages_are_right_in_a_browser(site: Path, name: str, heading: str) -> None:
    """No error, nothing asked of other machines, nothing wider than a narrow window but what scrolls by itself."""
    with files(site) as address, page(width=900) as (opened, wrong, asked):
        opened.goto(f"{address}/{name}.html")
        assert heading in opened.inner_text("h1")
        assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert wrong == []
    assert [url for url in asked if not url.startswith(address)] == []


def test_the_reference_pages_are_those_of_the_code() -> None:
    """docs/cli.md and docs/settings.md are what docs/build_reference.py makes."""
    import runpy

    for name, render in runpy.run_path(str(ROOT / "docs" / "build_reference.py"))["PAGES"].items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == render(), "run python docs/build_reference.py"
