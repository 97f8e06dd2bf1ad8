"""What a metric of the catalogue is: its name and the words for it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class MetricType(StrEnum):
    """The types of the exposition format that memtrace uses."""

    GAUGE = "gauge"
    COUNTER = "counter"
    INFO = "info"


class Unit(StrEnum):
    """What a value counts."""

    BYTES = "bytes"
    SECONDS = "seconds"
    RATIO = "ratio"
    WATTS = "watts"
    CELSIUS = "celsius"
    NONE = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric: the words for it, not its values."""

    name: str
    """As it is written in the text format, with `_total` or `_info` where the type has a suffix."""
    type: MetricType
    unit: Unit = Unit.NONE
    labels: tuple[str, ...] = ()
    """Labels besides `metrics.IDENTITY_LABELS`."""
    help: str
    """One sentence or two, for the HELP line and the documentation."""
    absent: str = ""
    """When there is no series; empty where there always is one."""
