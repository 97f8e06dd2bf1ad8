"""What a Prometheus would have scraped, written into a real one by remote write: its marks of staleness included.

`promtool tsdb create-blocks-from` knows no such marks: a series that ends counts as there for five minutes more, and
two runs on one port would never meet as they do in a real one.
"""

from __future__ import annotations

import struct
import urllib.request
from collections.abc import Iterable, Iterator, Mapping

RECEIVER = "--web.enable-remote-write-receiver"
"""The option with which a Prometheus takes what is written to it."""
STALE = struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000002))[0]
"""The value that ends a series."""
INTERVAL = 15
"""Seconds between two scrapes."""
_PIECE = 65536

Labels = tuple[tuple[str, str], ...]
"""Names and values of the labels of a series, the name of the metric as `__name__` among them; sorted."""
Sample = tuple[float, float]
"""Seconds since 1970, and the value."""


def write(url: str, series: Mapping[Labels, Iterable[Sample]]) -> None:
    """Writes samples of at most an hour into an empty Prometheus, the oldest series first."""
    ordered = sorted(((labels, sorted(samples, key=_time)) for labels, samples in series.items()), key=_begin)
    message = b"".join(_field(1, _series(labels, samples)) for labels, samples in ordered)
    headers = {
        "Content-Encoding": "snappy",
        "Content-Type": "application/x-protobuf",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
    }
    request = urllib.request.Request(f"{url}/api/v1/write", data=_snappy(message), headers=headers)
    with urllib.request.urlopen(request, timeout=60):
        pass


def labels_of(name: str, labels: Mapping[str, str]) -> Labels:
    """Returns the labels of a series of a metric."""
    return tuple(sorted({"__name__": name, **labels}.items()))


def with_ends(samples: Mapping[float, float]) -> list[Sample]:
    """Returns the samples of a series by time, with a mark of staleness at the first scrape that has it no more."""
    missing = {at + INTERVAL for at in samples} - samples.keys()
    return sorted({**samples, **dict.fromkeys(missing, STALE)}.items())


def _time(sample: Sample) -> float:
    return sample[0]


def _begin(series: tuple[Labels, list[Sample]]) -> tuple[float, Labels]:
    labels, samples = series
    return samples[0][0], labels


def _series(labels: Labels, samples: Iterable[Sample]) -> bytes:
    """Returns a `TimeSeries` of Prometheus's remote write protocol."""
    named = b"".join(_field(1, _field(1, name.encode()) + _field(2, value.encode())) for name, value in labels)
    told = b"".join(
        _field(2, b"\x09" + struct.pack("<d", value) + b"\x10" + _number(round(at * 1000))) for at, value in samples
    )
    return named + told


def _field(number: int, content: bytes) -> bytes:
    """Returns a field of protobuf that has a length."""
    return _number(number << 3 | 2) + _number(len(content)) + content


def _number(value: int) -> bytes:
    """Returns a varint."""
    return bytes(_sevens(value))


def _sevens(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value


def _snappy(content: bytes) -> bytes:
    """Returns a block of snappy that copies everything as it is."""
    pieces = (content[at : at + _PIECE] for at in range(0, len(content), _PIECE))
    return _number(len(content)) + b"".join(b"\xf4" + struct.pack("<H", len(piece) - 1) + piece for piece in pieces)
