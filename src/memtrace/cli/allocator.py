"""`memtrace allocator`: what CUDA's allocator reserved for a recorded step, and what other settings would have."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from memtrace.allocator.recording import AllocatorRecording
from memtrace.cli.allocator_table import document, tables
from memtrace.cli.show import choose_records, console, find_logs
from memtrace.errors import ConfigError, LogFormatError
from memtrace.exporters.run_directory.allocator_file import allocator_path, read_recording
from memtrace.record.units import parse_bytes

_NAME = re.compile(r"allocator-rank(\d{1,9})\.json\.gz")


class Allocator:
    """Replays what the allocator was asked for, under its own settings and under others."""

    name = "allocator"
    summary = (
        "Replay what CUDA's allocator was asked for: fragments and who pins them, and what other settings would save."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the recording, and what it is replayed under."""
        parser.add_argument(
            "recorded",
            type=Path,
            metavar="RUN_DIR|SNAPSHOT",
            help="the directory of a run with a recording (allocator_recording=True), the recording itself, or a "
            "pickle of torch.cuda.memory._dump_snapshot with a history",
        )
        parser.add_argument("--what-if", action="store_true", help="compare settings of PYTORCH_ALLOC_CONF")
        parser.add_argument(
            "--setting",
            action="append",
            default=[],
            metavar="TEXT",
            help="another one to compare, such as max_split_size_mb:256, again for each",
        )
        parser.add_argument(
            "--limit",
            metavar="SIZE",
            help="what the allocator may reserve in all, such as 40GiB; by default what the recording says",
        )
        parser.add_argument("--rank", type=int, metavar="R", help="by default the lowest one with a recording")
        parser.add_argument(
            "--device", type=int, metavar="N", help="of a snapshot; by default the first with a history"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")

    def run(self, arguments: argparse.Namespace) -> int:
        """Prints the comparison.

        Raises:
            ConfigError: a setting or the limit cannot be read, or there is no such rank or device.
            LogFormatError: there is no recording, or it cannot be read.
            OutputError: the snapshot cannot be opened.
        """
        from memtrace.allocator.settings import parse_settings  # noqa: PLC0415 - the help needs none of it
        from memtrace.allocator.what_if import what_if  # noqa: PLC0415

        limit = None if arguments.limit is None else parse_bytes(arguments.limit)
        if limit == 0:
            raise ConfigError("--limit must be above 0")
        more = [parse_settings(text) for text in arguments.setting]
        recording = _recording(arguments.recorded, arguments.rank, arguments.device)
        found = what_if(recording, limit=limit, others=None if arguments.what_if else (), more=more)
        if arguments.json:
            print(json.dumps(document(found), indent=2, allow_nan=False))
        else:
            console().print(tables(found))
        return 0


def _recording(path: Path, rank: int | None, device: int | None) -> AllocatorRecording:
    if path.is_dir():
        return read_recording(_file_in(path, rank))
    if path.name.endswith(".json.gz"):
        return read_recording(path)
    from memtrace.forensics.as_recording import as_recording  # noqa: PLC0415 - most runs have no snapshot
    from memtrace.forensics.loader import load_snapshot  # noqa: PLC0415

    return as_recording(load_snapshot(path), device, path.name)


def _file_in(directory: Path, rank: int | None) -> Path:
    """Returns the recording of a rank in a run's directory, or in the one directory below that has some.

    Raises:
        ConfigError: that rank has none.
        LogFormatError: nobody has; the message says why, as far as the step log tells.
    """
    for home, ranks in _homes(directory):
        if rank is not None and rank not in ranks:
            raise ConfigError(f"{home} has no recording of rank {rank}, only of {', '.join(map(str, ranks))}")
        return allocator_path(home, ranks[0] if rank is None else rank)
    device = ""
    with suppress(LogFormatError):
        device = next(iter(choose_records(find_logs(directory), None).values())).device
    if device == "cpu":
        raise LogFormatError(
            f"{directory}: this run was on a CPU, which has no caching allocator: PYTORCH_ALLOC_CONF changes nothing "
            "there"
        )
    raise LogFormatError(
        f"{directory}: there is no recording of the allocator, no allocator-rank<R>.json.gz: set "
        "allocator_recording=True, which keeps the traced step with the highest peak"
    )


def _homes(directory: Path) -> Iterator[tuple[Path, list[int]]]:
    """Yields each directory with recordings and the ranks that have one: this one, then those in it."""
    try:
        for home in [directory, *(below for below in sorted(directory.iterdir()) if below.is_dir())]:
            ranks = sorted(int(found[1]) for file in home.iterdir() if (found := _NAME.fullmatch(file.name)))
            if ranks:
                yield home, ranks
    except OSError as error:
        raise LogFormatError(f"{directory}: the directory cannot be read: {error.strerror or error}") from error
