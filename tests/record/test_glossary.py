"""The terms of the field: one wording everywhere."""

from __future__ import annotations

import ast
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtrace.record import glossary, metrics
from memtrace.record.glossary import TERMS, Term

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REPLACED = [(word, term) for term in TERMS for word in term.instead_of]

WORDED = [
    (metrics.HEADROOM, glossary.HEADROOM),
    (metrics.CAPACITY, glossary.CAPACITY),
    (metrics.STEP_PEAK, glossary.PEAK),
    (metrics.PREDICTED_PEAK, glossary.FORECAST_PEAK),
    (metrics.OOM_RISK, glossary.RISK),
    (metrics.GROWTH, glossary.GROWTH),
    (metrics.TIME_TO_LIMIT, glossary.TIME_TO_OOM),
    (metrics.OVERHEAD, glossary.OVERHEAD),
    (metrics.ALLOCATED, glossary.ALLOCATED),
    (metrics.RESERVED, glossary.RESERVED),
    (metrics.SLACK, glossary.SLACK),
    (metrics.PRIVATE_POOL, glossary.PRIVATE_POOL),
    (metrics.NON_TORCH, glossary.NON_TORCH),
    (metrics.DEVICE_LIMIT, glossary.DEVICE_LIMIT),
]


def titles(node: object) -> Iterator[str]:
    """Yields titles, descriptions and legends of a dashboard."""
    if isinstance(node, dict):
        yield from (str(node[key]) for key in ("title", "description", "legendFormat") if node.get(key))
        for value in node.values():
            yield from titles(value)
    elif isinstance(node, list):
        for value in node:
            yield from titles(value)


def texts() -> dict[str, list[str]]:
    """Returns what people read, by where it stands."""
    boards = ROOT.glob("integrations/grafana/dashboards/*.json")
    found = {path.name: [*titles(json.loads(path.read_text()))] for path in boards}
    found["help texts"] = [metric.help for metric in metrics.CATALOGUE]
    found["rules"] = (ROOT / "integrations/prometheus/memtrace.rules.yml").read_text().splitlines()
    found["README"] = (ROOT / "README.md").read_text().splitlines()
    for page in sorted(DOCS.glob("*.md")):
        if page.name != "glossary.md":
            found[page.name] = page.read_text().splitlines()
    for room in ("cli", "exporters", "oom", "risk"):  # what they print is in their texts
        for path in sorted((ROOT / "src/memtrace" / room).rglob("*.py")):
            tree = ast.parse(path.read_text())
            found[f"{room}/{path.name}"] = [
                node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
            ]
    return found


def test_the_page_is_up_to_date():
    """docs/glossary.md is what its script makes of the terms."""
    rendered = runpy.run_path(str(DOCS / "build_glossary.py"))["render"]()
    assert rendered == (DOCS / "glossary.md").read_text(encoding="utf-8"), "run python docs/build_glossary.py"


def test_every_term_is_listed_once():
    """Each has a name and a sentence, and no two take the place of one word."""
    defined = {term.name for term in vars(glossary).values() if isinstance(term, Term)}
    assert defined == {term.name for term in TERMS}
    assert len(TERMS) == len({term.name for term in TERMS})
    assert all(term.meaning.endswith(".") and "\n" not in term.meaning for term in TERMS)
    assert len(REPLACED) == len({word for word, _ in REPLACED})


@pytest.mark.parametrize(("metric", "term"), WORDED, ids=lambda item: getattr(item, "name", None))
def test_help_texts_take_their_wording_from_the_terms(metric, term):
    """What a metric is, is said once."""
    assert metric.help == term.meaning


def test_no_text_uses_a_word_that_a_term_replaces():
    """In titles of panels, help texts, alerts, tables, README and pages."""
    wrong = [
        f"{place}: {word!r} in {text.strip()!r}: say {term.name}"
        for place, lines in texts().items()
        for text in lines
        for word, term in REPLACED
        if re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE)
    ]
    assert not wrong, "\n".join(wrong)


def test_a_replaced_word_is_found():
    """The search has something to find: each replaced word in a sentence of its own."""
    assert all(re.search(rf"\b{re.escape(word)}\b", f"It was {word}.", re.IGNORECASE) for word, _ in REPLACED)
