"""The processes that plan: they end with whoever asked, and do not wait for what a case leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checked_repository import CASES, write

pytestmark = pytest.mark.xdist_group("checked repository")

_CODE = """
import os
import signal
import sys
import threading

from network import batch, build, loss


def waits():
    with open("here", "w"):  # the other end is told that this process is there, and when it ends
        signal.pause()


def leaves_one_behind():
    if os.fork() == 0:
        open("here", "w").close()  # until somebody reads
        os._exit(0)
    sys.stdout = None
    return build()


def ends():
    leaves_one_behind()
    threading.Thread(target=threading.Event().wait).start()
    sys.exit(3)


def leaves_a_thread():
    threading.Thread(target=threading.Event().wait).start()
    print("printed before there was a plan")
    return build()


def no_such_file():
    open("absent.json")


"""


def _started(directory: Path, *builds: str) -> subprocess.Popen[str]:
    write(directory, first="build")
    (directory / "more.py").write_text(_CODE, encoding="utf-8")
    (directory / "broken.py").write_text("def build(:\n", encoding="utf-8")
    text = "".join(CASES.format(name=f"case{n}", build=build) for n, build in enumerate(builds))
    (directory / "memtrace.toml").write_text(text.replace("network:more", "more").replace("network:broken", "broken"))
    os.mkfifo(directory / "here")
    with (directory / "printed").open("w", encoding="utf-8") as printed:
        # A shell that started the tests in the background has Ctrl-C ignored, and all that they start inherits it.
        heard = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_module"
        command = [sys.executable, "-c", f"{heard}('memtrace', run_name='__main__')", "check", "--json"]
        return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, stderr=printed, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_cases_end_with_whoever_asked(tmp_path: Path, number: signal.Signals) -> None:
    """A case that would never end is ended by Ctrl-C without a traceback, and where nobody could tell it."""
    with _started(tmp_path, "more:waits") as process:
        with (tmp_path / "here").open(encoding="utf-8") as here:
            process.send_signal(number)
            assert here.read() == "", "comes back when the case has ended"
        assert process.wait() == (130 if number is signal.SIGINT else -number)
    assert "Traceback" not in (tmp_path / "printed").read_text(encoding="utf-8")


def test_what_a_case_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    """A process, a thread or a case without an output holds nothing up; missing files and wrong code are reasons."""
    builds = "more:leaves_one_behind", "more:no_such_file", "broken:build", "more:leaves_a_thread", "more:ends"
    with _started(tmp_path, *builds) as process:
        assert process.stdout is not None
        try:
            process.wait(timeout=120)
            answer = process.stdout.read()
            assert process.returncode == 2 and '"case0"' in answer and '"case3"' in answer
        finally:
            (tmp_path / "here").open(encoding="utf-8").close()
    said = (tmp_path / "printed").read_text(encoding="utf-8")
    assert "case case1 cannot be planned: the model cannot be made: FileNotFoundError: [Errno 2]" in said
    assert (
        "case case2 cannot be planned: build cannot be imported: SyntaxError: invalid syntax (broken.py, line 1)"
        in said
    )
    assert "case case4 cannot be planned: its process ended with status 3 before there was a plan" in said
    assert "Traceback" not in said and said.count("printed before there was a plan") == 1
