"""A plan: what a step will need, by the same moments and categories that a running step is measured in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from memtrace.errors import LogFormatError, OutputError
from memtrace.record.breakdown import Breakdown
from memtrace.record.categories import Moment
from memtrace.record.schema import PLAN_SCHEMA, moments_document, parse_moments
from memtrace.record.strict_json import Fields, parse_json


class Verdict(StrEnum):
    """Whether a step runs on a device."""

    FITS = "fits"
    UNCERTAIN = "uncertain"
    DOES_NOT_FIT = "does_not_fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """From the least to the most that something may take."""

    low: int
    high: int | None
    """None where nobody knows."""

    def __add__(self, other: ByteRange) -> ByteRange:
        high = None if self.high is None or other.high is None else self.high + other.high
        return ByteRange(low=self.low + other.low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A plan held against a device."""

    device: str
    """Name of the device, or the capacity as it was asked for."""
    capacity_bytes: int
    """What a process can use of it."""
    needed: ByteRange
    """What the whole process needs, with context and libraries."""

    @property
    def verdict(self) -> Verdict:
        """Fits where even the most does, does not where not even the least does."""
        if self.needed.low > self.capacity_bytes:
            return Verdict.DOES_NOT_FIT
        if self.needed.high is None or self.needed.high > self.capacity_bytes:
            return Verdict.UNCERTAIN
        return Verdict.FITS

    @property
    def headroom(self) -> tuple[int | None, int]:
        """Bytes to spare if the step needs the most (None where that is not known), and if it needs the least."""
        worst = None if self.needed.high is None else self.capacity_bytes - self.needed.high
        return worst, self.capacity_bytes - self.needed.low


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one rank will need for a step."""

    recipe: str
    optimizer: str
    setup: Mapping[str, str | int | float]
    """What was asked for besides, such as `parameters` or `world_size`; shown and written, never interpreted."""
    moments: Mapping[Moment, Breakdown]
    """At least the peak."""
    assumptions: tuple[str, ...]
    """What the figures rest on, as sentences."""
    allocated: ByteRange
    """What torch will have allocated at the peak, from the least to the most."""
    reserved_bytes: int | None = None
    """What the caching allocator will hold at most; None where its blocks were not simulated."""
    reserved_margin: float = 0.0
    """Share by which that may be more, where a part of it cannot be known beforehand."""
    host_bytes: int = 0
    """Model states that are kept in the memory of the host, for this rank."""
    fit: Fit | None = None

    @property
    def total_bytes(self) -> int:
        """Sum of all categories at the peak."""
        return self.moments[Moment.PEAK].total_bytes

    @property
    def verdict(self) -> Verdict | None:
        """Whether it fits; None where no device was named."""
        return None if self.fit is None else self.fit.verdict


def plan_document(plan: Plan) -> dict[str, Any]:
    """Returns the plan in the form of the public contract, `memtrace.plan/1`, ready for `json`."""
    document: dict[str, Any] = {
        "schema": PLAN_SCHEMA,
        "recipe": plan.recipe,
        "optimizer": plan.optimizer,
        "setup": dict(plan.setup),
        "assumptions": list(plan.assumptions),
        "total_bytes": plan.total_bytes,
        "moments": moments_document(plan.moments),
        "allocated_bytes": {"low": plan.allocated.low, "high": plan.allocated.high},
        "reserved_bytes": plan.reserved_bytes,
        "host_bytes": plan.host_bytes,
        "verdict": plan.verdict,
    }
    if plan.fit is not None:
        worst, best = plan.fit.headroom
        document["device"] = {
            "name": plan.fit.device,
            "capacity_bytes": plan.fit.capacity_bytes,
            "needed_bytes": {"low": plan.fit.needed.low, "high": plan.fit.needed.high},
            "headroom_bytes": {"low": worst, "high": best},
        }
    return document


def parse_plan(document: Any, source: str) -> Plan:
    """Returns the plan that a document stands for.

    Args:
        document: the file, parsed.
        source: its name, for messages.

    Raises:
        LogFormatError: the document is not a `memtrace.plan/1`; the message names the source and the field.
    """
    fields = Fields.of(document, source)
    fields.schema(PLAN_SCHEMA)
    moments = parse_moments(fields.object("moments"))
    if Moment.PEAK not in moments:
        raise LogFormatError(f"{source}: moments must have the peak, got {', '.join(moments) or 'none'}")
    total = moments[Moment.PEAK].total_bytes
    if fields.integer("total_bytes") != total:
        raise LogFormatError(f"{source}: total_bytes must be the sum of the entries at the peak, {total}")
    allocated = fields.optional("allocated_bytes", _range)
    return Plan(
        recipe=fields.text("recipe"),
        optimizer=fields.optional("optimizer", Fields.text) or "",
        setup=fields.optional("setup", _setup) or {},
        moments=moments,
        assumptions=tuple(_texts(fields, "assumptions")),
        allocated=allocated or ByteRange(low=total, high=total),
        reserved_bytes=fields.optional("reserved_bytes", Fields.integer),
        host_bytes=fields.optional("host_bytes", Fields.integer) or 0,
        fit=fields.optional("device", _fit),
    )


def read_plan(path: str | Path) -> Plan:
    """Returns the plan in a file that `memtrace plan --json` wrote.

    Raises:
        OutputError: the file cannot be read.
        LogFormatError: it holds something else.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise OutputError(f"the plan {path} cannot be read: {error}") from error
    return parse_plan(parse_json(text, str(path)), str(path))


def _range(fields: Fields, name: str) -> ByteRange:
    found = fields.object(name)
    return ByteRange(low=found.integer("low"), high=found.optional("high", Fields.integer))


def _fit(fields: Fields, name: str) -> Fit:
    found = fields.object(name)
    return Fit(
        device=found.text("name"),
        capacity_bytes=found.integer("capacity_bytes"),
        needed=_range(found, "needed_bytes"),
    )


def _setup(fields: Fields, name: str) -> dict[str, str | int | float]:
    found = fields.object(name).values
    return {
        key: value
        for key, value in found.items()
        if isinstance(value, (str, int, float)) and not isinstance(value, bool)
    }


def _texts(fields: Fields, name: str) -> list[str]:
    texts = Fields({f"{name}[{at}]": item for at, item in enumerate(fields.array(name))}, fields.source, fields.path)
    return [texts.text(at) for at in texts]
