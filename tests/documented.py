"""What documentation shows: the blocks of a page, how they are run, and whether the output is what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
_INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n|\n(?= {4}))+)")

VARIES = (
    (re.compile(r"[█▉▊▋▌▍▎▏─]+"), ""),
    (re.compile(r"\d{8}T\d{6}(\.\d+)?Z"), "TIME"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "TIME"),
    (re.compile(r"\d+(\.\d+)? (ms|s|min)\b"), "DURATION"),
    (re.compile(r"encoder\.layer\.\d+[\w.]*"), "LAYER"),  # where it runs out depends on what the process had before
    (re.compile(r"\bline \d+"), "LINE"),
)
"""What differs from run to run and says nothing, and what stands in its place when outputs are compared."""

_NUMBER = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(?![\w.]*\w)")
TOLERANCE = 0.1
"""Share by which a number may differ: an allocator, a C library or a Python of another version needs other amounts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block of code of one page."""

    page: str
    line: int
    language: str
    """Of the fence; empty for a block that is indented."""
    text: str

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Each command of a console block with the output that follows it there; an indented one has no output."""
        if not self.language:
            return [(line, "") for line in self.text.splitlines() if line]
        return _COMMAND.findall(self.text)


def blocks_of(path: Path) -> list[Block]:
    """Returns the blocks of a page, in its order."""
    text = path.read_text(encoding="utf-8")
    page = path.relative_to(ROOT).as_posix()
    found = [(match.start(), match[2], dedent(match[3])) for match in _FENCE.finditer(text)]
    without = _FENCE.sub(lambda match: re.sub(r"[^\n]", "~", match[0]), text)  # a fence holds no indented block
    found += [(match.start(), "", dedent(match[1]).strip("\n") + "\n") for match in _INDENTED.finditer(without)]
    return [
        Block(page=page, line=text.count("\n", 0, at) + 1, language=language, text=body)
        for at, language, body in sorted(found)
    ]


def run_command(command: str, directory: Path) -> tuple[int, str]:
    """Returns exit status and output, both streams together as in a terminal, of a command in a directory."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MEMTRACE_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def difference(said: str, shown: str) -> str | None:
    """Returns where an output is not what a page says; None where it is.

    A line `...` of the page stands for any number of lines, `...` within a line for anything in it. Space counts as
    one space, numbers may differ by `TOLERANCE`, and `VARIES` says what else may.
    """
    wanted, found = list(_lines(said)), list(_lines(shown))
    at = 0
    anywhere = False
    for line in wanted:
        if line == "...":
            anywhere = True
            continue
        while anywhere and at < len(found) and not _same(line, found[at]):
            at += 1
        if at == len(found) or not _same(line, found[at]):
            instead = found[at] if at < len(found) else "the end"
            return f"the page says\n    {line}\nand the output is\n    {instead}\nin\n{shown}"
        at += 1
        anywhere = False
    if at < len(found) and not anywhere:
        return f"the output goes on with\n    {found[at]}\nin\n{shown}"
    return None


def _lines(text: str) -> Iterator[str]:
    for pattern, instead in VARIES:
        text = pattern.sub(instead, text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    yield from filter(None, lines)


def _same(line: str, found: str) -> bool:
    """Whether a line of an output is the one of a page."""
    if "..." in line:
        parts = [re.escape(_NUMBER.sub("0", part)) for part in line.split("...")]
        return re.fullmatch(".*".join(parts), _NUMBER.sub("0", found)) is not None
    if _NUMBER.sub("0", line) != _NUMBER.sub("0", found):
        return False
    pairs = zip_longest(_numbers(line), _numbers(found))
    return all(b is not None and a is not None and abs(a - b) <= TOLERANCE * max(a, b) for a, b in pairs)


def _numbers(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in _NUMBER.findall(line)]
