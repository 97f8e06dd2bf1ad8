"""The frame of the `memtrace` command."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import memtrace
from memtrace import cli
from memtrace.cli import COMMANDS, main
from memtrace.errors import ConfigError


class Failing:
    """A command that raises what it is given."""

    name = "fail"
    summary = "Fail."
    error: BaseException = ConfigError("port must be 0..65535, got 99999")

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--with", dest="reason")

    def run(self, arguments: argparse.Namespace) -> int:
        raise self.error


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    """Registers a command that fails."""
    command = Failing()
    monkeypatch.setattr(cli, "COMMANDS", (*COMMANDS, command))
    return command


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the version of the package."""
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"memtrace {memtrace.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_explains_itself(command: cli.Command, capsys: pytest.CaptureFixture[str]) -> None:
    """The help of the program and of the command has the command's summary."""
    for arguments in (["--help"], [command.name, "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert " ".join(command.summary.split()) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], ["dance"], ["show"], ["show", "x", "--step", "two"]])
def test_a_mistake_in_the_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments that mean nothing print the usage and end with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: memtrace")


def test_an_error_of_memtrace_is_one_line(failing: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    """What the user got wrong is told without a traceback, with status 2."""
    assert main(["fail"]) == 2
    assert capsys.readouterr() == ("", "memtrace: port must be 0..65535, got 99999\n")


def test_an_interrupt_is_no_traceback(failing: Failing, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends the command as a shell expects it."""
    failing.error = KeyboardInterrupt()
    assert main(["fail"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_fault_is_not_hidden(failing: Failing) -> None:
    """What is not the user's mistake keeps its traceback."""
    failing.error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


def test_the_module_is_the_command() -> None:
    """`python -m memtrace` and the installed `memtrace` do the same."""
    installed = Path(sys.executable).with_name("memtrace")
    outputs = [
        subprocess.run([*command, "--help"], check=True, capture_output=True, text=True).stdout
        for command in ([sys.executable, "-m", "memtrace"], [str(installed)])
    ]
    assert outputs[0] == outputs[1] != ""


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """`memtrace ... | head` ends without a word when the pipe is closed early."""
    script = """
import sys
from memtrace import cli
class Talks:
    name, summary = "talk", "Talk."
    def add_arguments(self, parser): pass
    def run(self, arguments):
        while True:
            print("x" * 1000)
cli.COMMANDS = (Talks(),)
sys.exit(cli.main(["talk"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "x" * 1000 + "\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0


@pytest.mark.parametrize("at_work", [False, True], ids=["alone", "a thread goes on"])
def test_a_command_ends_with_all_that_was_to_be_done_at_exit(at_work: bool) -> None:
    """Its status and its output are those of an end in which Python takes apart all that was loaded."""
    script = f"""
import atexit, sys, threading
from memtrace import __main__, cli
class Fails:
    name, summary = "fail", "Fail."
    def add_arguments(self, parser): pass
    def run(self, arguments):
        print("said")
        return 1
cli.COMMANDS = (Fails(),)
sys.argv = ["memtrace", "fail"]
atexit.register(print, "registered")
goes_on = threading.Event()
if {at_work}:
    threading.Thread(target=lambda: goes_on.wait() and print("a thread")).start()
status = __main__.main()
print("taken apart")
goes_on.set()
sys.exit(status)
"""
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (1, "")
    lines = process.stdout.splitlines()
    assert sorted(lines[1:]) == (["a thread", "registered", "taken apart"] if at_work else ["registered"])
    assert lines[0] == "said"


def test_a_command_without_a_stream_ends_as_ever() -> None:
    """A caller may have closed what it does not want to hear."""
    run = Path(__file__).parents[1] / "fixtures" / "gpu" / "llama-3-8b"
    command = ["bash", "-c", f"{sys.executable} -m memtrace runs {run} 2>&-"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0
    assert "begun" in process.stdout


def test_a_command_loads_no_others_file() -> None:
    """To load all of them takes a fifth of a second, which each plan would wait for."""
    script = """
import sys
from memtrace.cli import main
try:
    main(["plan", "--help"])
finally:
    loaded = {name.split(".")[2] for name in sys.modules if name.startswith("memtrace.cli.")}
    sys.stderr.write(" ".join(sorted(loaded)))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"plan", "command"} <= set(ended.stderr.split())
    assert not {"check", "compare", "read", "watch", "export", "allocator"} & set(ended.stderr.split()), ended.stderr
