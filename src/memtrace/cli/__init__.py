"""The `memtrace` command: one file for each subcommand, and one place where errors become messages.

In come arguments and files. Out goes text for people, or JSON. Must not need torch before a command needs it. A new
command is a file with a `Command`, and its place in `COMMANDS`: only the one that is named is loaded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import cached_property
from importlib import import_module
from io import TextIOWrapper

import memtrace
from memtrace.cli.command import Command
from memtrace.cli.run import Run
from memtrace.errors import MemTraceError, packages_of


class _Named:
    """A command by its name: its file is loaded when it is used. To load all takes a fifth of a second.

    Args:
        name: of the command.
        module: where it is, below `memtrace.cli`.
        kind: its class.
    """

    def __init__(self, name: str, module: str, kind: str) -> None:
        self.name = name
        self._module, self._kind = module, kind

    @cached_property
    def _command(self) -> Command:
        found: Command = getattr(import_module(f"{__name__}.{self._module}"), self._kind)()
        return found

    @cached_property
    def summary(self) -> str:
        """One line for `memtrace --help`."""
        return self._command.summary

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares options and arguments."""
        self._command.add_arguments(parser)

    def run(self, arguments: argparse.Namespace) -> int:
        """Does the work and returns the exit status."""
        return self._command.run(arguments)


COMMANDS: tuple[Command, ...] = (
    Run(),
    _Named("show", "show", "Show"),
    _Named("plan", "plan.command", "PlanCommand"),
    _Named("compare", "compare", "Compare"),
    _Named("check", "check", "Check"),
    _Named("bisect", "bisect", "Bisect"),
    _Named("report", "report", "Report"),
    _Named("runs", "runs", "Runs"),
    _Named("export", "export.command", "Export"),
    _Named("read", "read", "Read"),
    _Named("allocator", "allocator", "Allocator"),
    _Named("watch", "watch", "Watch"),
)
"""Every subcommand, in the order of the help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `memtrace` and returns its exit status: 0, or 2 for what the user got wrong.

    Args:
        argv: the arguments; those of the process where none are given.

    Raises:
        SystemExit: after `--help`, `--version` or a mistake in the arguments, as argparse does.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # an encoding without our signs must not end the command
        sys.stdout.reconfigure(errors="replace")
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == [Run.name] and given[1:2] not in ([], ["-h"], ["--help"]):  # it reads its arguments by itself
        arguments = argparse.Namespace(command=Run(), words=given[1:])
    else:
        arguments = _parser(given[:1]).parse_args(given)
    command: Command = arguments.command
    try:
        with packages_of(f"memtrace {command.name}"):
            return command.run(arguments)
    except MemTraceError as error:
        print(f"memtrace: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _parser(named: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Returns the parser of the command that is named, or of all where none is."""
    parser = argparse.ArgumentParser(
        prog="memtrace", description="What every byte of GPU memory is for in PyTorch training."
    )
    parser.add_argument("--version", action="version", version=f"memtrace {memtrace.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in [command for command in COMMANDS if command.name in named] or COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser
