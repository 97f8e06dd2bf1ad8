"""The `memtrace` command: one file for each subcommand, and one place where errors become messages.

In come arguments and files. Out goes text for people, or JSON. Must not need torch before a command needs it. A new
command is a file with a `Command`, and its place in `COMMANDS`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

import memtrace
from memtrace.cli.allocator import Allocator
from memtrace.cli.bisect import Bisect
from memtrace.cli.check import Check
from memtrace.cli.command import Command
from memtrace.cli.compare import Compare
from memtrace.cli.export.command import Export
from memtrace.cli.plan.command import PlanCommand
from memtrace.cli.read import Read
from memtrace.cli.report import Report
from memtrace.cli.run import Run
from memtrace.cli.runs import Runs
from memtrace.cli.show import Show
from memtrace.cli.watch import Watch
from memtrace.errors import MemTraceError, packages_of

COMMANDS: tuple[Command, ...] = (
    Run(),
    Show(),
    PlanCommand(),
    Compare(),
    Check(),
    Bisect(),
    Report(),
    Runs(),
    Export(),
    Read(),
    Allocator(),
    Watch(),
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
        arguments = _parser().parse_args(given)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memtrace", description="What every byte of GPU memory is for in PyTorch training."
    )
    parser.add_argument("--version", action="version", version=f"memtrace {memtrace.__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.summary, description=command.summary)
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser
