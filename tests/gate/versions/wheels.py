"""Wheels made on the spot: packages of one module, in directories that pip takes them from."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

NO_INDEX = "--no-index"


def write_wheel(directory: Path, name: str, version: str, code: str, requires: Sequence[str] = ()) -> None:
    """Writes a wheel with one module, which has the name of the package."""
    stem, information = f"{name}-{version}", f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(directory / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{information}/METADATA", "\n".join(metadata) + "\n")
        wheel.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{information}/RECORD", "")
