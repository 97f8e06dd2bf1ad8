"""`memtrace compare`: what was planned and what was measured, or two runs, and the difference."""

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

from memtrace.cli.compare_runs import Threshold, comparison_document, comparison_table, equal_steps
from memtrace.cli.show import choose_records, console, find_logs
from memtrace.errors import ConfigError
from memtrace.exporters.table import category_name, printable
from memtrace.planning.comparison import Difference, compare
from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import Moment
from memtrace.record.plan import Plan, read_plan
from memtrace.record.units import format_bytes


class Compare:
    """Holds a plan, or another run, against a run."""

    name = "compare"
    summary = "Compare a plan with a measured step, or two runs in steps of equal shape: each category's difference."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what is compared, which step of it, and the growth that is an error."""
        parser.add_argument(
            "first",
            type=Path,
            metavar="PLAN.json|RUN_A",
            help="what memtrace plan --json wrote, or the run before: its directory, or a step log (.jsonl)",
        )
        parser.add_argument("log", type=Path, metavar="LOG|RUN_DIR", help="a step log, or the directory that has them")
        parser.add_argument(
            "--step",
            type=int,
            metavar="N",
            help="with a plan by default the last one whose peak is known; with two runs the newest of each shape of "
            "the batch that both have",
        )
        parser.add_argument(
            "--rank",
            type=int,
            metavar="R",
            help="with a plan by default the lowest one that has a log; with two runs all that both have",
        )
        parser.add_argument(
            "--fail-above",
            metavar="SIZE|PERCENT",
            help="exit with status 1 where a peak is above the one of the plan or of RUN_A by more, such as 512MiB or "
            "5%%; with two runs the peak of any rank and shape",
        )
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, arguments: argparse.Namespace) -> int:
        """Prints the comparison; returns 1 where a peak is above the threshold.

        Raises:
            ConfigError: the rank or the step is not in the log.
            LogFormatError: plan or log cannot be read.
            OutputError: the plan cannot be opened.
            PlanError: plan and step know no moment in common.
        """
        threshold = None if arguments.fail_above is None else Threshold.parse(arguments.fail_above)
        if arguments.first.is_dir() or arguments.first.suffix == ".jsonl":
            return _compare_runs(arguments, threshold)
        plan = read_plan(arguments.first)
        records = choose_records(find_logs(arguments.log), arguments.step)
        rank = min(records) if arguments.rank is None else arguments.rank
        if rank not in records:
            raise ConfigError(f"{arguments.log} has no log of rank {rank}, only of {', '.join(map(str, records))}")
        differences = compare(plan, records[rank])
        if arguments.json:
            print(json.dumps(_document(plan, records[rank], differences), indent=2, allow_nan=False))
        else:
            console().print(_table(plan, records[rank], differences))
        total = differences[Moment.PEAK][-1] if Moment.PEAK in differences else None
        return int(threshold is not None and total is not None and threshold.is_passed(total.planned, total.measured))


def _compare_runs(arguments: argparse.Namespace, threshold: Threshold | None) -> int:
    paths = (arguments.first, arguments.log)
    found = equal_steps(*paths, arguments.rank, arguments.step)
    names = (printable(str(paths[0])), printable(str(paths[1])))
    if arguments.json:
        print(json.dumps(comparison_document(names, found), indent=2, allow_nan=False))
    else:
        console().print(comparison_table(names, found))
    return int(threshold is not None and any(threshold.is_passed(pair.peak.first, pair.peak.second) for pair in found))


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
