"""The baseline: what every case took when it was written, and the versions that it was made with."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memtrace
from memtrace.errors import ConfigError, OutputError
from memtrace.gate.result import CaseResult, parse_result, result_document
from memtrace.record.strict_json import read_document
from memtrace.record.whole_file import write_whole

BASELINE_SCHEMA = "memtrace.baseline/1"

_PACKAGES = ("peft", "torch", "transformers")
"""Packages that a plan depends on besides memtrace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """Results by case, and what made them."""

    versions: Mapping[str, str]
    """By package; those that are not installed are left out. Without the label of a build, such as `+cpu`."""
    cases: Mapping[str, CaseResult]


def versions_here() -> dict[str, str]:
    """Returns the versions that a plan in this environment is made with."""
    found = {"memtrace": memtrace.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def baseline_text(baseline: Baseline) -> str:
    """Returns the JSON text of a baseline: sorted, one number a line."""
    document: dict[str, Any] = {
        "schema": BASELINE_SCHEMA,
        "versions": dict(baseline.versions),
        "cases": {name: result_document(result) for name, result in baseline.cases.items()},
    }
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Writes a baseline whole or not at all.

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        write_whole(path, baseline_text(baseline))
    except OSError as error:
        raise OutputError(f"the baseline {path} cannot be written: {error.strerror or error}") from error


def read_baseline(path: Path) -> Baseline:
    """Returns the baseline in a file.

    Raises:
        ConfigError: there is no such file.
        LogFormatError: it cannot be read, or has not the documented form.
    """
    fields = read_document(path, "baseline", BASELINE_SCHEMA)
    if fields is None:
        raise ConfigError(f"there is no baseline {path}: memtrace check --update writes it")
    versions, cases = fields.object("versions"), fields.object("cases")
    return Baseline(
        versions={name: versions.text(name) for name in versions},
        cases={name: parse_result(cases.object(name)) for name in cases},
    )
