"""The results of benchmarks: one JSON file each, with what they were measured on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

SCHEMA = "memtrace.benchmark/1"
RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch-memtrace", "torch", "transformers")


def environment(device: torch.device) -> dict[str, Any]:
    """Returns what a figure depends on: versions, the machine and the device."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "system": f"{platform.system()} {platform.machine()}",
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def write(name: str, result: Mapping[str, Any], measured_on: Mapping[str, Any], directory: Path | None = None) -> Path:
    """Writes one result and returns its file, `<device>-<name>.json`."""
    path = (directory or RESULTS) / f"{measured_on['device']}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema": SCHEMA, "benchmark": name, "environment": measured_on, **result}
    path.write_text(json.dumps(_rounded(document), indent=1) + "\n", encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    """Returns a document with six significant digits: more is noise, and makes every line of a diff long."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Returns the processor's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
