"""The summary of a run, handed to the trackers that the user's run has: each is a module that the user has imported."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memtrace.adapters.memory_tracer import MemoryTracer
from memtrace.exporters.trackers.summary import history_of, page, table
from memtrace.guard import Told

KEY = "memtrace/table"
"""Where a tracker shows the table."""
TABLE, REPORT = "table.txt", "report.html"

logger = logging.getLogger("memtrace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a tracker keeps of a run."""

    table: str
    directory: Path
    """Has the table and, where it could be made, the report as files, while trackers take them."""


@contextmanager
def summary_of(tracer: MemoryTracer) -> Iterator[Summary | None]:
    """Yields the summary of a run, while it has its tracer; None before its first step."""
    snapshot = tracer.snapshot()
    text = table(snapshot)
    if text is None:
        yield None
        return
    run = history_of(tracer.history, snapshot, tracer.config.max_tokens)
    contents = {TABLE: text, REPORT: None if run is None else page(run)}
    with TemporaryDirectory(prefix="memtrace-") as directory:
        for name, content in contents.items():
            if content is not None:
                Path(directory, name).write_text(content, encoding="utf-8", errors="replace")
        yield Summary(table=text, directory=Path(directory))


def hand_over(tracer: MemoryTracer, takers: list[Callable[[Summary], None]]) -> None:
    """Hands the summary of a run to trackers. What one of them raises is logged, and keeps it from no other."""
    if not takers:
        return
    try:
        with summary_of(tracer) as summary:
            for take in takers if summary is not None else ():
                Told(take, "handing the table of the run to a tracker")(summary)
    except OSError as error:
        logger.warning("memtrace: trackers get no table of the run, its files cannot be written: %s", error)


def to_tensorboard(writer: Any) -> Callable[[Summary], None]:
    """Returns what hands the table to a SummaryWriter, of torch or tensorboardX; it has no place for files."""

    def take(summary: Summary) -> None:
        writer.add_text(KEY, _as_markdown(summary.table))
        writer.flush()

    return take


def to_wandb(run: Any) -> Callable[[Summary], None]:
    """Returns what hands the table and an artifact of both files to a run of W&B."""

    def take(summary: Summary) -> None:
        wandb = sys.modules["wandb"]
        run.log({KEY: wandb.Html(f"<pre>{escape(summary.table)}</pre>")})
        artifact = wandb.Artifact(f"memtrace-{run.id}", type="memtrace")
        artifact.add_dir(str(summary.directory))
        run.log_artifact(artifact)

    return take


def to_mlflow(client: Any, run_id: str) -> Callable[[Summary], None]:
    """Returns what puts both files among the artifacts of a run of MLflow."""

    def take(summary: Summary) -> None:
        client.log_artifacts(run_id, str(summary.directory), "memtrace")

    return take


def to_trackio(trackio: Any) -> Callable[[Summary], None]:
    """Returns what hands the table to the run that Trackio has in progress, and both files where it takes artifacts.

    Args:
        trackio: the module.
    """

    def take(summary: Summary) -> None:
        trackio.log({KEY: trackio.Markdown(_as_markdown(summary.table))})
        if hasattr(trackio, "log_artifact"):
            trackio.log_artifact(summary.directory, name="memtrace", type="memtrace")

    return take


def _as_markdown(text: str) -> str:
    """Returns a text as a block of code, in the form that needs no end mark."""
    return "\n".join(f"    {line}" for line in text.splitlines())
