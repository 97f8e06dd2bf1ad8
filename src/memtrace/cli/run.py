"""`memtrace run`: starts a script whose trainings are traced, without a line of code in it."""

from __future__ import annotations

import argparse


class Run:
    """Becomes the script or the command that it is given; see `launch.command`, which reads its arguments."""

    name = "run"
    summary = (
        "Start a training script that is traced without a change in it: whatever it trains, with Trainer, Lightning, "
        "Accelerate, DeepSpeed or a plain loop, and in every process that it starts."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares settings and command, for the help: what follows the script is the script's own."""
        parser.add_argument(
            "words",
            nargs=argparse.REMAINDER,
            metavar="[--SETTING VALUE]... SCRIPT|COMMAND|-m MODULE [ARGUMENT]...",
            help="settings first, as --trace-every 50, --quiet or --no-step-log: see settings.md. Then a Python "
            "script, a command on PATH such as llamafactory-cli or torchrun, or -m and a module; the rest is its own",
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Starts it, in the place of this process.

        Raises:
            ConfigError: a setting is unknown or out of range, or there is nothing to start.
        """
        from memtrace.launch.command import start  # noqa: PLC0415 - as `memtrace.__main__` does

        return start(arguments.words)
