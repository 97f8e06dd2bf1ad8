"""Links of README.md, docs/ and integrations/ lead to what is in the repository, and anchors to a heading."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from documented import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "integrations").glob("*.md"))

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page, made of its headings as GitHub and the site make them."""
    headings = _HEADING.findall(_FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Returns the links of a page that lead nowhere; links to other machines are not followed."""
    found = []
    for link in LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            found.append(link)
    return found


def own_addresses(text: str) -> list[str]:
    """Returns the addresses on other machines that memtrace is said to have in a text."""
    return re.findall(r"(?:https?://|git@|\b(?:git(?:hub|lab)|ghcr)\.\w+[/:])[\w./:@-]*memtrace[\w./@-]*", text)


def test_one_place_says_where_memtrace_is() -> None:
    """The metadata of a release: its page, which the upload makes. No other file has an address that may not exist."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    suffixes = {".md", ".py", ".toml", ".yml", ".yaml", ".json", ".sh", ".ipynb", ""}
    paths = [ROOT / name for name in tracked.split("\0") if name and not name.startswith("tests/")]
    found = {
        path.relative_to(ROOT).as_posix(): addresses
        for path in paths
        if path.suffix in suffixes and (addresses := own_addresses(path.read_text(encoding="utf-8")))
    }
    assert found == {"pyproject.toml": ["https://pypi.org/project/torch-memtrace/"]}
    assert own_addresses("see https://memtrace.io/docs, git@github.com:a/memtrace.git, ghcr.io/a/memtrace:1") == [
        "https://memtrace.io/docs",
        "git@github.com:a/memtrace.git",
        "ghcr.io/a/memtrace",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Relative to the page, as a reader of the repository follows them."""
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """A page that is not there, and a heading that is not on it."""
    page = tmp_path / "page.md"
    page.write_text("# Will it fit?\n[a](gone.md) [b](#will-it-fit) [c](page.md#other) [d](https://x.y/z)\n")
    assert broken(page) == ["gone.md", "page.md#other"]
