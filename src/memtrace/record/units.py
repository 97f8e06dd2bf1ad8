"""Bytes for people: GiB is 2**30 bytes and GB is 10**9 bytes, and the text always says which."""

from __future__ import annotations

import re

from memtrace.errors import ConfigError

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
GB = 10**9

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": GB,
    "tb": 10**12,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*")


def format_bytes(count: int | float) -> str:
    """Returns `count` bytes in the largest binary unit that leaves at least 1, such as `4.80 GiB` or `512 B`."""
    size = float(count)
    for unit, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


def format_gib(count: int | float) -> str:
    """Returns `count` bytes as a number of GiB, with more digits the smaller it is, without the unit."""
    gib = count / GIB
    if gib == 0:
        return "0"
    digits = 2 if abs(gib) >= 1 else 3 if abs(gib) >= 0.1 else 4
    return f"{gib:.{digits}f}"


def parse_bytes(text: str) -> int:
    """Returns the bytes that a text such as `24GiB`, `80 GB` or `1073741824` stands for.

    Raises:
        ConfigError: the text is not a number followed by one of B, kB, MB, GB, TB, KiB, MiB, GiB, TiB.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ConfigError(f"a size must be a number and a unit such as 24GiB or 80GB, got {text!r}")
    value = float(match[1]) * _UNITS[match[2].lower()]
    if value >= 2**63:
        raise ConfigError(f"a size must be below 8 EiB, got {text!r}")
    return int(value)
