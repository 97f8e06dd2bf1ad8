"""The arguments of `memtrace run`: settings, then the script or command with its own; and how that is started."""

from __future__ import annotations

import os
import sys

from memtrace.errors import ConfigError

TYPE_CHECKING = False  # what `typing` would say: each process of a training waits for all that is imported here
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VARIABLE = "MEMTRACE_RUN"
"""Says that what this process and those that it starts train is traced; 0 in a child's environment says that it is
not."""
PREFIX = "MEMTRACE_"
STARTUP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "startup")  # noqa: PTH118, PTH100, PTH120
"""The directory with what Python runs at its start."""
NEEDS = "memtrace run needs a script, a command, or -m and a module: memtrace run train.py"


def start(arguments: Sequence[str], place: Sequence[str] = ()) -> int:
    """Becomes the script: the process goes on as Python, or as the command, and nothing of this one is left.

    So exit status, signals, standard input, `__main__`, tracebacks and the id of the process are the script's own.

    Args:
        arguments: what follows `memtrace run`.
        place: what a launcher tells a script by arguments before all others.

    Returns:
        Never, but for tests that stand in for `os.execve`.

    Raises:
        ConfigError: a setting is unknown or out of range, there is no such command, or Python was told to ignore what
            this needs.
    """
    settings, command = read(arguments)
    named = 2 if command[0] == "-m" else 1
    command[named:named] = place
    environment = {**os.environ, **settings}
    if any(name.startswith(PREFIX) and name != VARIABLE for name in environment):
        check(environment)
    program, words = program_of(command)
    if program != sys.executable:
        _handle_signals_again()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    try:
        os.execve(program, words, traced(environment))
    except OSError as error:
        raise ConfigError(f"{program} cannot be started: {error.strerror}") from error
    return 0


def read(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the settings as variables of the environment, and the command: a script or `-m` first.

    `--trace-every 50` and `--trace-every=50` are the same; `--quiet` and `--no-step-log` have no value. All that
    follows the first word without a dash, or `-m`, or `--`, is the command's own.

    Raises:
        ConfigError: a setting is unknown or has no value, or there is no command.
    """
    settings: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-") and rest[0] != "-m":
        word = rest.pop(0)
        if word == "--":
            break
        name, equals, value = word[2:].partition("=")
        setting, switch = _setting(word, name.replace("-", "_"))
        if switch is None:
            if not equals and not rest:
                raise ConfigError(f"{word} needs a value, and a script after it")
            settings[setting] = value if equals else rest.pop(0)
        elif equals:
            raise ConfigError(f"--{name} has no value: write --{name} or --no-{name}")
        else:
            settings[setting] = switch
    if not rest or rest == ["-m"]:
        raise ConfigError(NEEDS)
    return settings, rest


def _setting(word: str, name: str) -> tuple[str, str | None]:
    """Returns the variable of a setting, and what a switch sets it to; None where it has a value.

    Raises:
        ConfigError: it is no setting, or one that has no variable.
    """
    from memtrace.config import TracerConfig  # noqa: PLC0415 - nobody waits for it who gives no settings

    if not word.startswith("--"):
        raise ConfigError(f"{word} is no setting of memtrace run: its settings begin with two dashes, as --port 0")
    annotations = TracerConfig.__annotations__
    is_off = name.startswith("no_") and annotations.get(name[3:]) == "bool"
    name = name[3:] if is_off else name
    TracerConfig.check_names([name])
    if annotations[name].startswith("Callable"):
        raise ConfigError(f"{word} needs a function, which only a script can give: MemTraceCallback({name}=function)")
    switch = None if annotations[name] != "bool" else "0" if is_off else "1"
    return f"{PREFIX}{name.upper()}", switch


def check(environment: Mapping[str, str]) -> None:
    """Checks the settings that the script will have.

    Raises:
        ConfigError: one is out of range; it names the variable.
    """
    from memtrace.config import TracerConfig  # noqa: PLC0415 - nobody waits for it who gives no settings

    os.environ.update(environment)
    TracerConfig()


def program_of(command: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the program to start, and its words: this Python for scripts and modules, what is on PATH for others.

    Raises:
        ConfigError: there is no such command, or Python was told to ignore the environment.
    """
    first = command[0]
    is_python = first == "-m" or first.endswith((".py", ".pyz", ".zip")) or os.path.isdir(first)  # noqa: PTH112
    found = None if is_python else _on_path(first)
    if found is not None:
        return found, list(command)
    if not is_python and not os.path.exists(first):  # noqa: PTH110
        raise ConfigError(f"{first} is neither a script nor a command on PATH")
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise ConfigError("memtrace run needs PYTHONPATH and Python's site module: run it without -E, -I and -S")
    return sys.executable, [sys.executable, *_options(), *command]


def _on_path(name: str) -> str | None:
    import shutil  # noqa: PLC0415 - takes as long as Python's own start, and a script does not need it

    return shutil.which(name)


def _handle_signals_again() -> None:
    """Hands back the signals that Python ignores, and that a program would inherit as ignored."""
    import signal  # noqa: PLC0415 - see above

    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(ignored, signal.SIG_DFL)


def _options() -> list[str]:
    """Returns the options of this Python, as in `python -u -X dev -m memtrace run`."""
    words = sys.argv[1:]
    if sys.orig_argv[len(sys.orig_argv) - len(words) :] != words:  # somebody has changed them
        return []
    own = sys.orig_argv[1 : len(sys.orig_argv) - len(words)]  # the last one is the script, or -m and the module
    return own[:-2] if own[-2:-1] == ["-m"] else own[:-1]


def traced(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process whose trainings are traced, and of those that it starts."""
    before = environment.get("PYTHONPATH", "")
    if before.split(os.pathsep)[0] != STARTUP:  # it does where one `memtrace run` starts another
        before = STARTUP + os.pathsep + before if before else STARTUP  # an empty entry would be the working directory
    return {**environment, VARIABLE: "1", "PYTHONPATH": before}
