"""Real text that every Python installation has: which standard-library module does a docstring come from?

The examples learn this from the sources beside the interpreter, so that they need no download. About 2,700 docstrings
in 16 classes; who always names the largest class is right one time in eight.
"""

from __future__ import annotations

import ast
import sysconfig
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODULES = (
    "_pydecimal",
    "asyncio",
    "email",
    "http",
    "importlib",
    "inspect",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "pathlib",
    "tarfile",
    "typing",
    "unittest",
    "urllib",
    "xml",
)
"""The classes; the label of a docstring is the position of its module here.

The best documented modules that every distribution installs with Python itself (Debian has tkinter and idlelib in
packages of their own) and that no supported version of Python has dropped (3.12 did so with distutils).
"""

MINIMUM_CHARACTERS = 25
"""Shorter docstrings, such as `Constructor.`, say nothing about their module."""

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True, kw_only=True)
class Docstring:
    """One docstring and where it comes from."""

    text: str
    label: int
    """Position of the module in `MODULES`."""


def load_docstrings() -> list[Docstring]:
    """Returns each docstring of `MODULES` once, always in the same order; takes about two seconds.

    A text that two modules share is left out, because no answer would be right.
    """
    library = Path(sysconfig.get_path("stdlib"))
    labels: dict[str, set[int]] = {}
    for label, module in enumerate(MODULES):
        for path in _source_files(library, module):
            for text in _docstrings_in(path):
                labels.setdefault(text, set()).add(label)
    return [Docstring(text=text, label=min(found)) for text, found in labels.items() if len(found) == 1]


def split(docstrings: Sequence[Docstring], *, every: int = 5) -> tuple[list[Docstring], list[Docstring]]:
    """Returns the docstrings for training and, about one in `every`, those for evaluation.

    A checksum of the text decides, so that a docstring is on the same side on every machine.
    """
    train: list[Docstring] = []
    evaluation: list[Docstring] = []
    for docstring in docstrings:
        held_out = zlib.crc32(docstring.text.encode()) % every == 0
        (evaluation if held_out else train).append(docstring)
    return train, evaluation


def tokenize(
    docstrings: Sequence[Docstring], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> list[Mapping[str, object]]:
    """Returns what a sequence classifier takes, a mapping for each docstring, cut at `max_tokens` and not yet padded.

    The keys are `input_ids`, `attention_mask` and whatever else the tokenizer gives, and `labels`.
    """
    encoded = tokenizer([docstring.text for docstring in docstrings], truncation=True, max_length=max_tokens)
    return [
        {**{key: values[row] for key, values in encoded.items()}, "labels": docstring.label}
        for row, docstring in enumerate(docstrings)
    ]


def _source_files(library: Path, module: str) -> list[Path]:
    """Returns the files of one module; the tests that some installations keep inside a package are not its text."""
    single = library / f"{module}.py"
    if single.is_file():
        return [single]
    return [
        path
        for path in sorted((library / module).rglob("*.py"))
        if not {"test", "tests"} & set(path.relative_to(library).parts)
    ]


def _docstrings_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= MINIMUM_CHARACTERS:
                yield text
