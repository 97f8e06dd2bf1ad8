"""What a plan says, as rows of text that the table and the markdown share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memtrace.planning.sharding.shares import Strategy
from memtrace.planning.what_if.remedies import Remedy
from memtrace.record.categories import Category, Moment
from memtrace.record.plan import Fit, Plan, Verdict
from memtrace.record.units import GB, GIB, format_bytes

if TYPE_CHECKING:
    from memtrace.planning.by_module import Holding

_HOLDERS = 12
"""Kinds of modules that are listed one by one."""

_SMALL_SHARE = 0.001
"""Share of the peak below which entries are joined."""

_VERDICTS = {
    Verdict.FITS: "fits",
    Verdict.UNCERTAIN: "uncertain",
    Verdict.DOES_NOT_FIT: "does not fit",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One entry of the peak, or its total."""

    category: Category | None
    """None for the total."""
    part: str
    size: int
    share: float


def peak_rows(plan: Plan) -> Iterator[Row]:
    """Yields the entries at the peak, then their total; entries that hardly show are one row for each category."""
    peak = plan.moments[Moment.PEAK]
    whole = peak.total_bytes
    joined: dict[tuple[Category, str], tuple[list[str], int]] = {}
    for key, size in peak.entries.items():
        part = f"{key.component} {key.dtype}".strip()
        row = key.category, part if size >= whole * _SMALL_SHARE else ""
        parts, before = joined.get(row, ([], 0))
        joined[row] = [*parts, part], before + size
    for (category, _), (parts, size) in joined.items():
        yield Row(category=category, part=", ".join(parts), size=size, share=size / whole)
    yield Row(category=None, part="", size=whole, share=1.0 if whole else 0.0)


def gigabytes(size: int, largest: int) -> tuple[str, str]:
    """Returns a size in GB and in GiB.

    Args:
        size: bytes.
        largest: of the sizes beside it, which all get the same number of digits: one from 100 GB on, two from 1 GB on,
            else three.
    """
    digits = 1 if largest >= 100 * GB else 2 if largest >= GB else 3
    return _digits(size / GB, digits), _digits(size / GIB, digits)


def _digits(number: float, digits: int) -> str:
    least = 10**-digits
    return f"<{least:.{digits}f}" if 0 < number < least / 2 else f"{number:,.{digits}f}"


def headline(plan: Plan) -> str:
    """Returns what was asked for, in one line."""
    setup = dict(plan.setup)
    parts = [f"{setup['parameters']:,} parameters" if "parameters" in setup else "plan", plan.recipe, plan.optimizer]
    if "model" in setup:
        parts.insert(0, str(setup["model"]))
    if "batch" in setup:
        parts.append(f"batch {setup['batch']}")
    if "further_models" in setup:
        parts.append(f"beside {setup['further_models']}")
    if setup.get("gradient_checkpointing") == "true":
        parts.append("checkpointing")
    if setup.get("mode") == "deepspeed":
        parts.append("DeepSpeed's constants")
    if setup.get("strategy", "none") != "none":
        parts.append(f"{_label(setup['strategy'])} over {setup.get('world_size', 1)} ranks")
    if "offload" in setup:
        parts.append(f"{setup['offload']} offloaded")
    return " · ".join(part for part in parts if part)


def _label(strategy: str | int | float) -> str:
    """Returns a strategy's name for people; a plan from elsewhere may have one that is not known here."""
    return Strategy(strategy).label if strategy in list(Strategy) else str(strategy)


def facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yields what there is besides the peak: other moments, the host, the device."""
    for moment, breakdown in plan.moments.items():
        if moment is not Moment.PEAK:
            yield moment.value.replace("_", " "), _both(breakdown.total_bytes)
    if plan.reserved_bytes is not None:
        yield "reserved by the allocator", _both(plan.reserved_bytes)
    for what in ("batch size", "seq len"):
        found = plan.setup.get(f"largest_{what.replace(' ', '_')}")
        if found is not None:
            yield f"largest {what} that fits", f"{found:,}"
    if plan.host_bytes:
        yield "in host memory", _both(plan.host_bytes)
    if plan.fit is not None:
        yield plan.fit.device, verdict_of(plan.fit)


def verdict_of(fit: Fit) -> str:
    """Returns the verdict with its reasons, in one line."""
    needed = format_bytes(fit.needed.low)
    if fit.needed.high is None:
        needed = f"at least {needed}"
    elif fit.needed.high != fit.needed.low:
        needed = f"{needed} to {format_bytes(fit.needed.high)}"
    worst, best = fit.headroom
    spare = best if worst is None or fit.verdict is Verdict.DOES_NOT_FIT else worst
    said = f"{format_bytes(spare)} to spare" if spare >= 0 else f"{format_bytes(-spare)} short"
    if fit.verdict is Verdict.UNCERTAIN:
        said = f"{said} at worst, {format_bytes(best)} to spare at best" if worst is not None else f"{said} at best"
    return f"{_VERDICTS[fit.verdict]}: needs {needed} of {format_bytes(fit.capacity_bytes)}, {said}"


def holding_rows(holdings: Sequence[Holding]) -> Iterator[tuple[str, str, str, str]]:
    """Yields name, number of modules, bytes and share of the largest holders of activations, then of all others."""
    whole = sum(holding.nbytes for holding in holdings)
    for holding in holdings[:_HOLDERS]:
        name = holding.name or "(outside of the model)"
        yield name, str(holding.modules), format_bytes(holding.nbytes), f"{holding.nbytes / whole:.1%}"
    rest = holdings[_HOLDERS:]
    if rest:
        size = sum(holding.nbytes for holding in rest)
        modules = sum(holding.modules for holding in rest)
        yield "(all others)", str(modules), format_bytes(size), f"{size / whole:.1%}"


def remedy_rows(found: list[Remedy]) -> Iterator[tuple[str, str, str, str]]:
    """Yields name, saving, the peak that remains and the verdict of each remedy."""
    for remedy in found:
        fit = remedy.plan.fit
        verdict = "" if fit is None else _VERDICTS[fit.verdict]
        yield remedy.name, _both(remedy.saved_bytes), _both(remedy.plan.total_bytes), verdict


def _both(size: int) -> str:
    return "{} GB ({} GiB)".format(*gigabytes(size, size))
