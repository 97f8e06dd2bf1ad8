"""`memtrace run` as a process: what it starts is what would have run without it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from memtrace.__main__ import main
from memtrace.errors import ConfigError
from memtrace.launch import command
from memtrace.launch.startup import sitecustomize

RUN = [sys.executable, "-m", "memtrace", "run"]

TELLS = """
import json, os, sys
if sys.argv[1:] == ["exit"]:
    sys.exit(3)
if sys.argv[1:] == ["raise"]:
    raise ValueError("bad data")
if sys.argv[1:] == ["die"]:
    os.kill(os.getpid(), 15)
if sys.argv[1:] == ["finders"]:
    print([type(finder).__name__ for finder in sys.meta_path])
else:
    print(json.dumps([__name__, sys.argv, sys.path, sys.flags.dev_mode, sys.stdin.read(), os.getpid()]))
"""

USES_TORCH = """
import json, sys
from types import FunctionType
import torch

model = torch.nn.Linear(2, 2)
torch.jit.script(model)(torch.ones(1, 2))
with torch.no_grad():
    model(torch.ones(1, 2))

def told(value):
    inner = getattr(value, "__func__", getattr(value, "fget", value)) if type(value) in WRAPPERS else value
    code = inner.__code__ if isinstance(inner, FunctionType) else None
    return [type(value).__name__, code and f"{code.co_filename}:{code.co_firstlineno}"]

WRAPPERS = (staticmethod, classmethod, property)
found = {}
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] == "torch":
        spaces = {name: vars(module)}
        for key, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == name:
                spaces[f"{name}.{key}"] = vars(value)
        found |= {f"{space}.{key}": told(value) for space, names in spaces.items() for key, value in names.items()}
print(json.dumps(found))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that tells of its process, in the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tells.py"
    path.write_text(TELLS)
    return path


def ran(words: Sequence[str | Path], stdin: str = "") -> tuple[int, str, str]:
    with subprocess.Popen(
        [*map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        out, err = process.communicate(stdin)
    return process.returncode, out, err.replace(str(process.pid), "PID")


@pytest.mark.parametrize("end", ["exit", "raise", "die"])
def test_it_ends_as_the_script_does(end: str, script: Path) -> None:
    """Status 3, an exception with its traceback, a signal: the same as without, to the last byte."""
    bare = ran([sys.executable, script, end])
    assert bare[0] == {"exit": 3, "raise": 1, "die": -signal.SIGTERM}[end]
    assert ran([*RUN, "--trace-every", "5", script, end]) == bare


def test_the_script_finds_what_it_would_find(script: Path) -> None:
    """Its name, arguments, path, standard input and Python's options are its own, and the process is the same one."""
    for words, options in (([script, "--port", "1"], []), (["-m", "tells", "a b"], ["-X", "dev"])):
        bare = json.loads(ran([sys.executable, *options, *words], "some text")[1])
        with subprocess.Popen(
            [sys.executable, *options, *RUN[1:], "--quiet", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            found = json.loads(process.communicate("some text")[0])
        assert found[:-1] == bare[:-1]
        assert found[-1] == process.pid


def test_a_command_that_starts_python(script: Path) -> None:
    """What it starts is awaited too, and nothing is where the variable says so."""
    finders = ran(["bash", "-c", f"{sys.executable} tells.py finders"])[1]
    assert "'Finder'" not in finders
    for words, is_there in (("", True), ("MEMTRACE_RUN=0", False)):
        status, out, _ = ran([*RUN, "bash", "-c", f"{words} {sys.executable} tells.py finders"])
        assert status == 0
        assert ("'Finder'" in out) is is_there
        assert is_there or out == finders
    shell = ran([*RUN, "bash", "-c", "kill -PIPE $$"])
    assert shell[0] == -signal.SIGPIPE  # Python's own start ignores it, which must not be handed on


def test_the_next_sitecustomize(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that Python would have run is run, under its name, and what it raises is told by Python as ever."""
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), *filter(None, [os.getenv("PYTHONPATH")])]))
    own = tmp_path / "own" / "sitecustomize.py"
    for text in ("import sys; print(__name__, __file__, sys.modules[__name__].__spec__.origin)", "raise OSError('no')"):
        own.write_text(text)
        bare = ran([sys.executable, script, "exit"])
        assert bare[1] or "Error in sitecustomize" in bare[2]
        assert ran(["bash", "-c", f"{sys.executable} tells.py exit"]) == bare
        found = ran([*RUN, "bash", "-c", f"{sys.executable} tells.py exit"])
        assert found[0] == 3
        assert found[1].splitlines()[-1:] == bare[1].splitlines()
        assert bare[2] in found[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trace-evry", "3", "x.py"], "unknown setting 'trace_evry': did you mean 'trace_every'?"),
        (["-x", "x.py"], "-x is no setting of memtrace run: its settings begin with two dashes, as --port 0"),
        (["--port"], "--port needs a value, and a script after it"),
        (["--quiet=yes", "x.py"], "--quiet has no value: write --quiet or --no-quiet"),
        (["--port", "99999", "x.py"], "MEMTRACE_PORT: port must be 0..65535, got 99999"),
        (["--port", "many", "x.py"], "MEMTRACE_PORT must be a whole number, got 'many'"),
        (["--port", "0"], command.NEEDS),
        (
            ["--on-record", "print", "x.py"],
            "--on-record needs a function, which only a script can give: MemTraceCallback(on_record=function)",
        ),
        (["-m"], command.NEEDS),
        (["no-such-command"], "no-such-command is neither a script nor a command on PATH"),
    ],
)
def test_what_the_user_got_wrong(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Is said in one line, before anything is started."""
    monkeypatch.setattr(sys, "argv", ["memtrace", "run", *words])
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main() == 2
    assert capsys.readouterr() == ("", f"memtrace: {message}\n")


@pytest.mark.parametrize("flag", ["ignore_environment", "no_site"])
def test_python_that_ignores_the_environment(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could not find what is to be found, which is said."""
    flags = SimpleNamespace(**{"ignore_environment": 0, "no_site": 0, flag: 1})
    monkeypatch.setattr(command, "sys", SimpleNamespace(flags=flags))
    with pytest.raises(ConfigError, match="run it without -E, -I and -S"):
        command.program_of(["train.py"])


class Started(Exception):
    """Stands for the end of this process."""


@pytest.mark.parametrize(
    ("words", "settings", "started"),
    [
        (["train.py", "--port", "1"], {}, ["PYTHON", "train.py", "--port", "1"]),
        (["--port", "0", "--", "train.py"], {"PORT": "0"}, ["PYTHON", "train.py"]),
        (["--trace-every=5", "-m", "package", "x"], {"TRACE_EVERY": "5"}, ["PYTHON", "-m", "package", "x"]),
        (["--no-step-log", "--quiet", "x.py"], {"STEP_LOG": "0", "QUIET": "1"}, ["PYTHON", "x.py"]),
        (["env", "-i"], {}, [shutil.which("env"), "-i"]),
    ],
)
def test_what_is_started(
    words: list[str], settings: dict[str, str], started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings become variables; a launcher's argument goes to the script, before the script's own."""
    environments: list[dict[str, str]] = []
    programs: list[list[str]] = []

    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        programs.append([program.replace(sys.executable, "PYTHON"), *arguments[1:]])
        environments.append(environment)
        raise Started

    handlers = {number: signal.getsignal(number) for number in (signal.SIGPIPE, signal.SIGXFSZ)}
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(os, "environ", {"PYTHONPATH": "mine", "PATH": os.environ["PATH"]})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "memtrace", "run", *words])
    for place in ([], ["--local_rank=1"]):
        monkeypatch.setattr(sys, "argv", ["memtrace", *place, "run", *words])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "memtrace", *place, "run", *words])
        with pytest.raises(Started):
            main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    at = 3 if started[1] == "-m" else 2 if started[0] == "PYTHON" else 1
    assert programs == [started, [*started[:at], "--local_rank=1", *started[at:]]]
    for environment in environments:
        assert environment["PYTHONPATH"] == os.pathsep.join([command.STARTUP, "mine"])
        assert {name: environment.get(f"MEMTRACE_{name}") for name in settings} == settings
        assert command.traced(environment) == environment  # one `memtrace run` inside another


@pytest.mark.parametrize("settings", [[], ["--port", "0", "--trace-every", "50"]], ids=["bare", "with settings"])
def test_the_start_loads_nothing(settings: list[str], script: Path) -> None:
    """Neither the command nor what Python runs at its start loads a parser, torch or an exporter; settings little."""
    heavy = {"argparse", "difflib", "pathlib", "prometheus_client", "rich", "torch", "typing", "urllib.parse"}
    heavy |= {"memtrace.cli", "memtrace.record.breakdown"}
    if not settings:
        heavy |= {"collections", "contextlib", "dataclasses", "inspect", "memtrace.config", "re"}
    code = "import os, sys; os.execve = lambda *a: print(*sys.modules); from memtrace.__main__ import main; main()"
    status, out, _ = ran([sys.executable, "-c", code, "run", *settings, "x.py"])
    assert status == 0
    assert heavy & set(out.split()) == set()
    code = f"{sys.executable} -c 'import sys; print(*sys.modules)'"
    bare, launched = (set(ran([*words, "bash", "-c", code])[1].split()) for words in ([], [*RUN, *settings]))
    assert launched - bare <= {"sitecustomize", "__future__"}


def test_modules_are_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is awaited has its own loader, and the finder is gone with the last one."""
    told = []
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "awaited_module.py").write_text("there = __spec__.loader\n")
    (tmp_path / "awaited_failing.py").write_text("raise OSError('no')\n")
    finder = sitecustomize.Finder({"awaited_module": "nothing", "awaited_failing": "nothing"})
    monkeypatch.setattr(finder, "loaded", lambda module: told.append(module.__name__))
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    import awaited_module

    with pytest.raises(OSError, match="no"):
        import awaited_failing  # noqa: F401
    assert told == ["awaited_module"]
    assert type(awaited_module.__loader__).__name__ == "SourceFileLoader"
    assert awaited_module.__spec__.loader is awaited_module.__loader__ is awaited_module.there


def test_nothing_of_torch_is_replaced(tmp_path: Path) -> None:
    """Every name of every module and class of torch that is loaded is what it is without, where nothing is trained."""
    script = tmp_path / "uses_torch.py"
    script.write_text(USES_TORCH)
    bare, found = (json.loads(ran([*words, script])[1]) for words in ([sys.executable], [*RUN, "--port", "none"]))
    assert len(bare) > 10_000
    assert {name: (bare.get(name), found.get(name)) for name in bare.keys() ^ found.keys()} == {}
    assert {name: (bare[name], found[name]) for name in bare if bare[name] != found[name]} == {}
