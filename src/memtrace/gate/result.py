"""What a case takes, as plain data, and its JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memtrace.errors import LogFormatError
from memtrace.record.categories import Moment
from memtrace.record.strict_json import Fields

OUTSIDE = "(outside of the model)"
"""Stands in files for no module: the optimizer's step, a loss beside the model and its gradients, the libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """The bytes of one case."""

    modules: Mapping[Moment, Mapping[str, Mapping[str, int]]]
    """By moment, by entry such as `activations float32` (category, component, type), by kind of module."""
    reserved_bytes: int | None
    """What the caching allocator will hold; None on a CPU."""
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """What is allocated at the peak."""
        return self.total(Moment.PEAK)

    def total(self, moment: Moment) -> int:
        """Returns what is allocated at a moment; 0 where the step has no such moment."""
        return sum(sum(sizes.values()) for sizes in self.modules.get(moment, {}).values())


def result_document(result: CaseResult) -> dict[str, Any]:
    """Returns the JSON form of a result: a line for each category, and one for each module that has some of it.

    At other moments than the peak, modules stand only where they have not what they have at the peak: most weights and
    states are said once.
    """
    peak = result.modules[Moment.PEAK]
    differing = {
        moment: held
        if moment is Moment.PEAK
        else {entry: sizes for entry, sizes in held.items() if sizes != peak.get(entry)}
        for moment, held in result.modules.items()
    }
    return {
        "peak_bytes": result.peak_bytes,
        "reserved_bytes": result.reserved_bytes,
        "host_bytes": result.host_bytes,
        "moments": {
            moment: {entry: sum(sizes.values()) for entry, sizes in held.items()}
            for moment, held in result.modules.items()
        },
        "modules": {
            moment: {entry: {name or OUTSIDE: size for name, size in sizes.items()} for entry, sizes in held.items()}
            for moment, held in differing.items()
        },
    }


def parse_result(fields: Fields) -> CaseResult:
    """Returns the result that an object stands for.

    Raises:
        LogFormatError: it has not the documented form, or its lines do not add up.
    """
    totals = {moment: _sizes(held) for moment, held in fields.object("moments").by_word(Moment).items()}
    written = {
        moment: {entry: _sizes(held.object(entry)) for entry in held}
        for moment, held in fields.object("modules").by_word(Moment).items()
    }
    peak = written.get(Moment.PEAK, {})
    modules = {
        moment: {entry: written.get(moment, {}).get(entry, peak.get(entry, {})) for entry in entries}
        for moment, entries in totals.items()
    }
    place = fields.path.removesuffix(".")
    if Moment.PEAK not in totals:
        raise LogFormatError(f"{fields.source}: {place} must have the moment peak")
    added = {moment: {entry: sum(of.values()) for entry, of in held.items()} for moment, held in modules.items()}
    unasked = any(set(held) - set(totals.get(moment, {})) for moment, held in written.items())
    result = CaseResult(
        modules=modules,
        reserved_bytes=fields.optional("reserved_bytes", Fields.integer),
        host_bytes=fields.integer("host_bytes"),
    )
    if added != totals or unasked or fields.integer("peak_bytes") != result.peak_bytes:
        raise LogFormatError(
            f"{fields.source}: {place} does not add up: was it edited or merged by hand? memtrace check --update "
            "writes it anew"
        )
    return result


def _sizes(fields: Fields) -> dict[str, int]:
    return {"" if name == OUTSIDE else name: fields.integer(name) for name in fields}
