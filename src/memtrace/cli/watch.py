"""`memtrace watch`: a run as it goes on, in a terminal."""

from __future__ import annotations

import argparse
import time
import urllib.error
import urllib.request
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from memtrace.cli.show import choose_records, console, endings, find_logs
from memtrace.errors import ConfigError, LogFormatError
from memtrace.exporters.live import live_view, parse_scrape
from memtrace.exporters.ranks import ranks_table
from memtrace.exporters.table import printable, step_table

TIMEOUT_SECONDS = 5.0
MAX_BYTES = 2**22
"""A scrape of one rank is some 20 KB; more than this is not one."""


class Watch:
    """Shows the newest state of a run over and over, from its metrics or from its log directory."""

    name = "watch"
    summary = "Watch a run in the terminal: from the address of its metrics, or from its log directory."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares what to watch and how often to look."""
        parser.add_argument(
            "target", metavar="URL|RUN_DIR", help="such as http://127.0.0.1:16368, or the directory of the step logs"
        )
        parser.add_argument(
            "--interval", type=float, default=2.0, metavar="SECONDS", help="time between two looks; default: 2"
        )
        parser.add_argument("--once", action="store_true", help="look once and end")

    def run(self, arguments: argparse.Namespace) -> int:
        """Shows the run until it is interrupted.

        A run that has ended says how. A trainer that no longer answers leaves its last state on the screen, with a line
        that says so.

        Raises:
            ConfigError: the interval is not 0.1..3600 seconds, or the address is none.
            LogFormatError: the first look finds nothing to show.
        """
        if not 0.1 <= arguments.interval <= 3600:
            raise ConfigError(f"--interval must be 0.1..3600 seconds, got {arguments.interval}")
        view = look(arguments.target)
        if arguments.once:
            console().print(view)
            return 0
        with Live(view, console=console(), screen=False, auto_refresh=False) as live:
            while True:
                time.sleep(arguments.interval)
                try:
                    view = look(arguments.target)
                    live.update(view, refresh=True)
                except LogFormatError as error:
                    live.update(Group(view, Text(printable(str(error)), "yellow")), refresh=True)


def look(target: str) -> RenderableType:
    """Returns the state of a run now.

    Raises:
        ConfigError: the address is not one of HTTP.
        LogFormatError: nobody answers there, or there is no log, or nothing in it yet.
    """
    if "://" in target:
        return live_view(parse_scrape(_scrape(target), target))
    logs = find_logs(Path(target))
    records = choose_records(logs, None)
    table = step_table(*records.values()) if len(records) == 1 else ranks_table(records)
    return Group(table, *(Text(words, "yellow") for words in endings(logs, records, good=True)))


def _scrape(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"the address of metrics must begin with http:// or https://, got {url}")
    address = url if url.rstrip("/").endswith("/metrics") else f"{url.rstrip('/')}/metrics"
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
            return str(answer.read(MAX_BYTES).decode("utf-8", "replace"))
    except (OSError, ValueError, urllib.error.HTTPError) as error:
        raise LogFormatError(f"{url}: no metrics there ({error})") from error
