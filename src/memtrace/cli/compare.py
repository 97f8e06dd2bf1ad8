"""`memtrace compare`: what was planned, what was measured, and the difference."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from memtrace.cli.show import choose_records, console, find_logs
from memtrace.errors import ConfigError
from memtrace.exporters.table import category_name
from memtrace.planning.comparison import Difference, compare
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.record.plan import Plan, read_plan
from memtrace.record.units import format_bytes


class Compare:
    """Holds a plan against a step of a run."""

    name = "compare"
    summary = "Compare a plan with a measured step: planned, measured and difference of each category."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the plan, the log, and which step of it."""
        parser.add_argument("plan", type=Path, metavar="PLAN.json", help="what memtrace plan --json wrote")
        parser.add_argument("log", type=Path, metavar="LOG|RUN_DIR", help="a step log, or the directory that has them")
        parser.add_argument("--step", type=int, metavar="N", help="by default the last one whose peak is known")
        parser.add_argument("--rank", type=int, metavar="R", help="by default the lowest one that has a log")
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, arguments: argparse.Namespace) -> int:
        """Prints the comparison.

        Raises:
            ConfigError: the rank or the step is not in the log.
            LogFormatError: plan or log cannot be read.
            OutputError: the plan cannot be opened.
            PlanError: plan and step know no moment in common.
        """
        plan = read_plan(arguments.plan)
        records = choose_records(find_logs(arguments.log), arguments.step)
        rank = min(records) if arguments.rank is None else arguments.rank
        if rank not in records:
            raise ConfigError(f"{arguments.log} has no log of rank {rank}, only of {', '.join(map(str, records))}")
        differences = compare(plan, records[rank])
        if arguments.json:
            print(json.dumps(_document(plan, records[rank], differences), indent=2, allow_nan=False))
        else:
            console().print(_table(plan, records[rank], differences))
        return 0


def _table(plan: Plan, record: StepRecord, differences: Mapping[Moment, Sequence[Difference]]) -> Group:
    planned = " · ".join(part for part in (plan.recipe, plan.optimizer) if part)
    title = f"{planned}, step {record.step} of rank {record.rank} on {record.device}"
    parts: list[Text | Table] = [Text(title, "bold")]
    for moment, rows in differences.items():
        table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
        table.add_column(moment.value.replace("_", " "), min_width=20, ratio=1)
        for head in ("planned", "measured", "difference", ""):
            table.add_column(head, justify="right", no_wrap=True)
        for row in rows:
            name = category_name(row.category) if row.category is not None else Text("total", "bold")
            if row.category is None:
                table.add_section()
            share = "" if row.ratio is None else f"{row.ratio:+.1%}"
            table.add_row(name, format_bytes(row.planned), format_bytes(row.measured), _signed(row.nbytes), share)
        parts.append(table)
    reading = record.allocator
    if plan.reserved_bytes is not None and reading is not None:
        planned, measured = format_bytes(plan.reserved_bytes), format_bytes(reading.reserved_bytes)
        parts.append(Text(f"reserved by the allocator: {planned} planned, {measured} measured"))
    return Group(*parts)


def _signed(nbytes: int) -> str:
    return f"+{format_bytes(nbytes)}" if nbytes > 0 else format_bytes(nbytes)


def _document(plan: Plan, record: StepRecord, differences: Mapping[Moment, Sequence[Difference]]) -> dict[str, Any]:
    return {
        "schema": "memtrace.compare/1",
        "recipe": plan.recipe,
        "optimizer": plan.optimizer,
        "step": record.step,
        "rank": record.rank,
        "moments": {
            moment.value: [
                {
                    "category": "total" if row.category is None else row.category.value,
                    "planned_bytes": row.planned,
                    "measured_bytes": row.measured,
                    "difference_bytes": row.nbytes,
                }
                for row in rows
            ]
            for moment, rows in differences.items()
        },
        "reserved_bytes": {
            "planned": plan.reserved_bytes,
            "measured": None if record.allocator is None else record.allocator.reserved_bytes,
        },
    }
