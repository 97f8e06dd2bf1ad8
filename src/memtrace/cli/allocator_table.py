"""A recording under several allocator settings, as tables for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memtrace.allocator.fragments import Fragment
from memtrace.allocator.what_if import Outcome, WhatIf
from memtrace.exporters.table import printable
from memtrace.record.units import format_bytes
from memtrace.sources.cuda.settings_variable import OLD_NAME, variable_for

WHAT_IF_SCHEMA = "memtrace.allocator/1"

NOTABLE_MISS = 0.03
"""Share by which the model may miss what was recorded before that is said as a warning."""
NOTABLE_SAVING = 0.01
"""Share of what the setting in force needs below which nothing is advised."""


def tables(found: WhatIf) -> RenderableType:
    """Returns what was recorded, the settings ranked, the fragments and what to set."""
    recording = found.recording
    parts: list[RenderableType] = [Text(_title(found), "bold"), *map(Text, _facts(found))]
    if len(found.ranked) > 1:
        parts += [_settings(found), Text(_advice(found))]
    if found.fragments:
        count = found.fragment_count
        words = f"{count:,} fragments" if count > 1 else "1 fragment"
        when = "when the request failed" if recording.failed_bytes is not None else "when most was reserved"
        free = format_bytes(found.fragment_bytes)
        parts += ["", Text(f"{free} free in {words} {when}, with the setting in force"), _fragments(found)]
    return Group(*parts)


def document(found: WhatIf) -> dict[str, Any]:
    """Returns the same ready for `json`."""
    recording = found.recording
    return {
        "schema": WHAT_IF_SCHEMA,
        "origin": recording.origin,
        "torch": recording.torch,
        "variable": variable_for(recording.torch),
        "events": len(recording.events),
        "from_the_start": recording.from_the_start,
        "limit_bytes": found.limit_bytes,
        "failed_bytes": recording.failed_bytes,
        "recorded_peak_reserved_bytes": recording.peak_reserved_bytes,
        "outcomes": [
            {
                "settings": outcome.settings.text,
                "in_force": outcome.in_force,
                "fits": outcome.fits,
                "reserved_bytes": outcome.reserved_bytes,
                "slack_bytes": outcome.slack_bytes,
                "rounding_bytes": outcome.rounding_bytes,
                "saved_bytes": found.saved_bytes(outcome),
                "retries": outcome.retries,
                "device_calls": outcome.device_calls,
            }
            for outcome in found.ranked
        ],
        "cached_bytes": found.cached_bytes,
        "fragment_count": found.fragment_count,
        "fragment_bytes": found.fragment_bytes,
        "fragments": [
            {
                "segment_bytes": fragment.size,
                "free_bytes": fragment.free_bytes,
                "pinned_by": fragment.pinned_by,
                "pinned_bytes": fragment.pinned_bytes,
                "pins": [{"bytes": pin.nbytes, "what": pin.name, "address": pin.address} for pin in fragment.pins],
            }
            for fragment in found.fragments
        ],
    }


def _title(found: WhatIf) -> str:
    recording = found.recording
    version = f"torch {printable(recording.torch)}" if recording.torch else ""
    settings = f"settings: {printable(recording.settings) or 'defaults'}"
    parts = (printable(recording.origin), version, settings, f"{len(recording.events):,} allocations and frees")
    return " · ".join(part for part in parts if part)


def _facts(found: WhatIf) -> Iterator[str]:
    recording, missed = found.recording, found.missed_ratio
    modelled = format_bytes(found.in_force.reserved_bytes)
    if missed is not None and recording.peak_reserved_bytes is not None:
        recorded = format_bytes(recording.peak_reserved_bytes)
        doubt = ": take the rest with care" if abs(missed) > NOTABLE_MISS else ""
        yield f"reserved at the peak: {recorded} recorded, {modelled} by the model ({missed:+.1%}){doubt}"
    elif recording.peak_reserved_bytes:
        yield f"reserved at the peak: {format_bytes(recording.peak_reserved_bytes)} recorded, {modelled} by the model"
    if not recording.from_the_start:
        begin = sum(recording.sizes_at_begin)
        count = len(recording.sizes_at_begin)
        yield (
            f"The recording begins with {count:,} blocks, {format_bytes(begin)}. The model puts them into an empty "
            "allocator: fragments and cached memory from before are in no figure below."
        )
    if recording.failed_bytes is not None:
        said = {
            True: "by the model there was room for it: take the rest with care",
            False: "by the model, too",
            None: "what could be reserved then is not recorded (--limit)",
        }
        yield f"a request of {format_bytes(recording.failed_bytes)} failed; {said[found.in_force.fits]}"
    if found.limit_bytes is not None:
        yield f"the allocator may reserve {format_bytes(found.limit_bytes)}"
    elif found.in_force.settings.garbage_collection_threshold is not None:
        yield "what may be reserved is not recorded, so the model collects no garbage: give it with --limit"


def _settings(found: WhatIf) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("setting", min_width=24, overflow="fold")
    for head in ("reserved", "slack", "saves", "fits", "retries", "device calls"):
        table.add_column(head, justify="right")
    for outcome in found.ranked:
        fits = {True: "yes", False: "no", None: ""}[outcome.fits]
        table.add_row(
            f"{_words(outcome)}{' (in force)' * outcome.in_force}",
            format_bytes(outcome.reserved_bytes),
            format_bytes(outcome.slack_bytes),
            "" if outcome.in_force else format_bytes(found.saved_bytes(outcome)),
            fits,
            f"{outcome.retries:,}",
            f"{outcome.device_calls:,}",
            style="bold" if outcome is found.ranked[0] and not outcome.in_force else "",
        )
    return table


def _advice(found: WhatIf) -> str:
    best = found.ranked[0]
    if best.in_force or found.saved_bytes(best) < NOTABLE_SAVING * found.in_force.needed_bytes:
        return "No other setting needs noticeably less: what is short is memory, not a setting."
    variable = variable_for(found.recording.torch)
    line = f"export {variable}={best.settings.text}" if best.settings.text else f"unset {variable}"
    if best.settings.garbage_collection_threshold is not None:
        line += "  # and torch.cuda.set_per_process_memory_fraction(1.0), without which torch does not collect"
    elif not found.recording.torch:
        line += f"  # {OLD_NAME} before torch 2.10"
    return line


def _fragments(found: WhatIf) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("free", justify="right", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    table.add_column("pinned by", ratio=1, overflow="fold")
    for fragment in found.fragments:
        table.add_row(format_bytes(fragment.free_bytes), format_bytes(fragment.size), _pins(fragment))
    return table


def _pins(fragment: Fragment) -> str:
    shown = []
    for pin in fragment.pins:
        where = "" if pin.address is None else f" at {pin.address:#x}"
        shown.append(f"{format_bytes(pin.nbytes)} {printable(pin.name) or 'of unknown use'}{where}")
    more = fragment.pinned_by - len(fragment.pins)
    if more:
        shown.append(f"and {more:,} more, {format_bytes(fragment.pinned_bytes)} in all")
    return "; ".join(shown)


def _words(outcome: Outcome) -> str:
    return outcome.settings.text.replace(",", ", ") or "defaults"
