"""Writes the runbook as a page that Prometheus serves: `python build_runbook.py [DIRECTORY]`.

Prometheus serves what lies in the directory of `--web.console.templates` under `/consoles/`, so that the address that
each alert carries works wherever Prometheus itself can be reached.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

HERE = Path(__file__).resolve().parent
RUNBOOK = HERE.parents[1] / "docs" / "runbook.md"
NAME = "memtrace-runbook.html"
STYLE = "body{max-width:50em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif}pre{background:#eee;padding:.6em}"


def page() -> str:
    """Returns the page: each section has the name of its alert in lower case as an anchor.

    Prometheus reads it as a template, in which two braces begin an expression; the runbook may hold none.
    """
    markdown = MarkdownIt()
    tokens = markdown.parse(RUNBOOK.read_text(encoding="utf-8"))
    for opened, text in pairwise(tokens):
        if opened.type == "heading_open":
            opened.attrSet("id", text.content.lower())
    body = markdown.renderer.render(tokens, markdown.options, {})
    assert "{{" not in body, "Prometheus would take this for a template"
    head = f'<meta charset="utf-8"><title>memtrace: runbook</title><style>{STYLE}</style>'
    note = "<!-- Written by build_runbook.py; do not edit. -->"
    return f"<!doctype html>\n{note}\n<html><head>{head}</head>\n<body>\n{body}</body></html>\n"


def main(directory: Path) -> None:
    """Writes the page."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / NAME).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "consoles")
