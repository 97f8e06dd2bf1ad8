"""What a subcommand of `memtrace` is."""

from __future__ import annotations

import argparse
from typing import Protocol


class Command(Protocol):
    """One subcommand. It raises MemTraceError for what the user got wrong; `main` turns that into a message."""

    name: str

    @property
    def summary(self) -> str:
        """One line for `memtrace --help`."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares options and arguments."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Does the work and returns the exit status. What takes long to import is imported here."""
