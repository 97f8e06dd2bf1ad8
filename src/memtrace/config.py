"""The settings of memtrace. The callback, the wrapper and the tracer take the same fields."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace

import memtrace
from memtrace.errors import ConfigError
from memtrace.record.units import KIB, MIB, parse_bytes

TYPE_CHECKING = False  # what `typing` would say: `memtrace run` waits for all that is imported here
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, Self

DEFAULT_PORT = 16368
"""First port of the metrics server; the local rank is added to it."""
DEFAULT_LOG_MAX_BYTES = 64 * MIB
"""Size at which a step log is rotated."""

_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _variable(name: str) -> str:
    return f"MEMTRACE_{name.upper()}"


def _setting(name: str, default: Any, *, repr: bool = True) -> Any:
    """Returns the field of a setting: what the environment says when it is asked for, else `default`."""

    def value() -> Any:
        text = os.environ.get(_variable(name))
        return default if text is None else _parse(name, text)

    return field(default_factory=value, repr=repr)


def _parse(name: str, text: str) -> Any:
    """Returns the value that a variable stands for, by the annotation of its field.

    Raises:
        ConfigError: the text stands for none of that type. A secret is not repeated.
    """
    annotation = str(TracerConfig.__annotations__[name])
    kinds = [kind.strip() for kind in annotation.split("|")]
    if "None" in kinds and text.strip().lower() in ("", "none"):
        return None
    try:
        if "bool" in kinds:
            return _WORDS[text.strip().lower()]
        if "int" in kinds:
            return int(text)
        return float(text) if "float" in kinds else text
    except (KeyError, ValueError) as error:
        expected = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kinds[0]]
        meant = _meant_int(name, text) if "int" in kinds else None
        raise ConfigError(f"{_variable(name)} must be {expected}, got {text!r}{_write(meant)}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class TracerConfig:
    """Settings of a tracer. Every field has a default that is right for an ordinary fine-tune.

    What code does not set is taken from the environment: `MEMTRACE_PORT` is `port`, and so on for each field but
    `on_record`. There, true and false are written as such or as 1 and 0, and an empty value or `none` is None where the
    field can be.

    Raises:
        ConfigError: a value is out of its range; it names the variable where it came from one.
    """

    port: int | None = _setting("port", DEFAULT_PORT)
    """Port of the Prometheus endpoint on the first local rank; each further local rank takes the next one, and a
    port in use is skipped for the next free one. 0 takes any free port. None opens no port."""
    address: str = _setting("address", "127.0.0.1")
    """Address that the endpoint listens on. Only this machine can reach the default."""
    tls_cert_file: str | os.PathLike[str] | None = _setting("tls_cert_file", None)
    """Certificate chain of the endpoint, PEM. With `tls_key_file` the endpoint speaks HTTPS only; one of the two
    without the other is an error."""
    tls_key_file: str | os.PathLike[str] | None = _setting("tls_key_file", None)
    """Private key of the certificate, PEM, not encrypted."""
    basic_auth_user: str | None = _setting("basic_auth_user", None)
    """User name that the endpoint asks for. None asks nobody. Without TLS the password crosses the network in clear."""
    basic_auth_password: str | None = _setting("basic_auth_password", None, repr=False)
    """Password of that user. A file keeps it out of scripts and of logged settings."""
    basic_auth_password_file: str | os.PathLike[str] | None = _setting("basic_auth_password_file", None)
    """File whose first line is the password, instead of `basic_auth_password`."""
    linger_seconds: float = _setting("linger_seconds", 0.0)
    """Seconds that the endpoint stays, at most, after the run has ended, in an OOM or by SIGTERM too, until it has been
    scraped once more: then `memtrace_run_state` says how it ended. The process waits for it, and holds its memory that
    long: 0, for which it does not, is for machines on which the next run waits for the device."""
    textfile_dir: str | os.PathLike[str] | None = _setting("textfile_dir", None)
    """Directory in which the metrics are left as `memtrace-<run_name>-<run_id>-rank<R>.prom` when the run begins, runs
    out of memory and ends, for the textfile collector of node_exporter. Runs may share it: every series has the labels
    `run` and `run_id`. The next run of the name removes files of those that ended an hour ago or longer. None leaves no
    file."""
    otlp_endpoint: str | None = _setting("otlp_endpoint", None)
    """Address of an OpenTelemetry collector that takes metrics by HTTP, such as `http://localhost:4318`. The metrics
    are pushed there every minute and at the end. `env` takes the address from the `OTEL_EXPORTER_OTLP_*` variables;
    the other `OTEL_*` variables are honoured in both cases. Needs the extra `otlp`. None pushes nothing."""
    log_dir: str | os.PathLike[str] | None = _setting("log_dir", None)
    """Directory of the step log. None means `<output_dir>/memtrace` under Trainer and `memtrace-runs/<run_name>` in a
    plain loop. The former is a link to `_memtrace` beside it, so that `push_to_hub` does not upload it."""
    step_log: bool = _setting("step_log", True)
    """Whether to write the step log at all."""
    timelines: bool = _setting("timelines", False)
    """Whether every traced step leaves its timeline beside the step log, in `timelines-rank<R>.jsonl`, for
    `memtrace export --perfetto`: about 20 KB each. False keeps only that of the highest peak."""
    log_max_bytes: int = _setting("log_max_bytes", DEFAULT_LOG_MAX_BYTES)
    """Size at which a step log is renamed to `steps-rank<R>.jsonl.1`, in place of the one before, and begun anew: a
    rank's logs never take more than twice as much."""
    oom_reports: int = _setting("oom_reports", 5)
    """How many reports of failed allocations are kept for each rank, the newest ones, beside the step log. 0 writes
    none."""
    allocator_recording: bool = _setting("allocator_recording", False)
    """On a CUDA device, whether what the allocator was asked for in the traced step with the highest peak so far is
    written to `allocator-rank<R>.json.gz` beside the step log, for `memtrace allocator`. It is written when memory runs
    out in any case, unless `oom_reports` is 0."""
    annotate_snapshots: bool = _setting("annotate_snapshots", False)
    """On a CUDA device, whether steps with a record write the category of each block that memtrace knows into the
    history that you record yourself by `torch.cuda.memory._record_memory_history`, for memory_viz and `memtrace read`
    to show. Needs torch 2.14. It takes an entry a tensor, with a stack where your history has stacks."""
    run_name: str | None = _setting("run_name", None)
    """Name of the run in metrics and logs. None means Trainer's run name, else the name of the script."""
    run_id: str | None = _setting("run_id", None)
    """What tells this launch from others of the same name, the same on all its ranks. None means the launcher's id
    (torchrun's, Slurm's job and step, PMIx's), else time, machine and process of its start."""
    trace_every: int | None = _setting("trace_every", None)
    """Traces every so many steps, besides the first one that has optimizer state. 0 traces only that first one and
    those asked for by `trace_next()`; 1 traces every step. None lets `overhead_budget` decide. With a number
    every step has a record, however short it is."""
    trace_activations: bool = _setting("trace_activations", True)
    """Whether traced steps follow what autograd saves for the backward pass. With False activations are what the
    forward pass makes and its backward pass frees, without element type; autocast's casts are among them. So they are
    in any case inside `torch.func.grad` and its kind, beside which torch before 2.14 allows no hooks."""
    overhead_budget: float = _setting("overhead_budget", 0.005)
    """Share of wall time that memtrace may take: traced steps are spaced so that it is kept, counting what memtrace
    does itself and what a traced step takes longer than its neighbours. 0.005 is half a percent. Of several ranks it is
    what the whole job may lose: a traced step of any is a longer step of all, so they trace in the same steps. Where a
    record of each step takes more than that, as with very short ones, not every step has a record:
    `sampling.TraceSchedule` says which."""
    max_trace_interval: int = _setting("max_trace_interval", 10_000)
    """Steps after which a step is traced whatever it costs, where `overhead_budget` decides; with several ranks the
    largest power of two within it."""
    device_limit_bytes: int | None = _setting("device_limit_bytes", None)
    """What the run may use of the device, in bytes. None means all that the device has."""
    max_tokens: int | None = _setting("max_tokens", None)
    """Tokens (samples x positions, padding included) of the largest micro batch that the run can meet: what the
    forecast of the peak is made for. None takes the lengths of the dataset where Trainer has them at hand, else the
    largest one seen."""
    plan: str | os.PathLike[str] | None = _setting("plan", None)
    """Plan of this run, as `memtrace plan --json` writes it: exported as `memtrace_plan_bytes` beside the measured."""
    device_poll_seconds: float = _setting("device_poll_seconds", 1.0)
    """Seconds between two readings of the device by the sampling thread. 0 reads at step ends only."""
    history: int = _setting("history", 256)
    """How many StepRecords `tracer.history` keeps."""
    trackers: bool = _setting("trackers", True)
    """Whether the trackers that Trainer or Lightning reports to (W&B, TensorBoard, MLflow, Trackio, ...) get figures of
    memory with each log, and at the end the table and a report: see docs/trackers.md. Where a run reports to none,
    nothing is done."""
    on_record: Callable[[memtrace.StepRecord], object] | None = field(default=None, repr=False)
    """Called with each StepRecord on the training thread, after the step log has it. Its time counts as memtrace's own,
    so that `overhead_budget` makes records fewer where it is slow. What it raises is logged once, and goes no
    further. Has no variable; whoever pickles the settings needs a function that can be pickled."""
    quiet: bool = _setting("quiet", False)
    """Whether memtrace keeps its words to itself: the line that says where metrics and log are, and the table at the
    end, both on stderr of the first process of each machine. Warnings go to the logger `memtrace` all the same."""
    strict: bool = _setting("strict", False)
    """Whether a fault inside memtrace is raised. False logs it once, switches memtrace off and lets training go on;
    True is for tests of memtrace itself."""

    def __post_init__(self) -> None:
        try:
            self._check()
        except ConfigError as error:
            told = [_variable(each.name) for each in fields(self) if self._is_told_by(each.name, str(error))]
            if not told:
                raise
            raise ConfigError(f"{', '.join(told)}: {error}") from error

    def _is_told_by(self, name: str, message: str) -> bool:
        """Whether a message is about a setting that has its value from the environment."""
        text = os.environ.get(_variable(name))
        about = re.search(rf"\b{name}\b", message) is not None
        return text is not None and about and getattr(self, name) == _parse(name, text)

    def _check(self) -> None:
        if self.port is not None:
            _check_int("port", self.port, 0, 65535)
        if not isinstance(self.address, str) or not self.address:
            raise ConfigError(f"address must be a host name or an IP address, got {self.address!r}")
        for name in ("log_dir", "plan", "textfile_dir", "tls_cert_file", "tls_key_file", "basic_auth_password_file"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, (str, os.PathLike)) or not os.fspath(path)):
                raise ConfigError(f"{name} must be a path, got {path!r}")
        self._check_endpoint()
        if self.otlp_endpoint is not None:
            check_otlp_endpoint("otlp_endpoint", self.otlp_endpoint)
        for name in ("run_name", "run_id"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text.strip()):
                raise ConfigError(f"{name} must be a text that is not blank, got {text!r}")
        if self.trace_every is not None:
            _check_int("trace_every", self.trace_every, 0, 10**9)
        _check_int("max_trace_interval", self.max_trace_interval, 1, 10**9)
        _check_number("overhead_budget", self.overhead_budget, 0, 1)
        _check_int("oom_reports", self.oom_reports, 0, 10**6)
        _check_int("history", self.history, 1, 10**6)
        _check_int("log_max_bytes", self.log_max_bytes, 64 * KIB, 2**63 - 1)
        if self.device_limit_bytes is not None:
            _check_int("device_limit_bytes", self.device_limit_bytes, 1, 2**63 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**63 - 1)
        _check_number("device_poll_seconds", self.device_poll_seconds, 0, 3600)
        _check_number("linger_seconds", self.linger_seconds, 0, 600)
        if self.on_record is not None and not callable(self.on_record):
            raise ConfigError(f"on_record must be a function that takes a StepRecord, got {self.on_record!r}")
        self._check_flags()

    def _check_flags(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "bool" and not isinstance(value, bool):
                meant = _WORDS.get(str(value).strip().lower())
                raise ConfigError(f"{each.name} must be True or False, got {value!r}{_write(meant)}")

    def _check_endpoint(self) -> None:
        """Checks that TLS and basic auth are each set whole or not at all. No message tells a secret."""
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            given, missing = ("cert", "key") if self.tls_key_file is None else ("key", "cert")
            raise ConfigError(f"tls_{given}_file is set without tls_{missing}_file: TLS needs both, plain HTTP neither")
        user, password = self.basic_auth_user, self.basic_auth_password
        if user is not None and (not isinstance(user, str) or not user or ":" in user):
            raise ConfigError(f"basic_auth_user must be a name without a colon, got {user!r}")
        if password is not None and (not isinstance(password, str) or not password):
            raise ConfigError("basic_auth_password must be a text that is not empty")
        if password is not None and self.basic_auth_password_file is not None:
            raise ConfigError("basic_auth_password and basic_auth_password_file are both set: one of them is enough")
        has_password = password is not None or self.basic_auth_password_file is not None
        if (user is not None) != has_password:
            given, missing = ("a password", "basic_auth_user") if has_password else ("basic_auth_user", "a password")
            raise ConfigError(f"{given} is set without {missing}: basic auth needs both")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """Returns the configuration for keyword arguments that a user wrote.

        Raises:
            ConfigError: a name is not a field (the message proposes the nearest one) or a value is out of range.
        """
        cls.check_names(settings)
        return cls(**settings)

    @classmethod
    def check_names(cls, settings: Iterable[str]) -> None:
        """Checks that each name is that of a setting.

        Raises:
            ConfigError: one is not; the message proposes the nearest one.
        """
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                import difflib  # noqa: PLC0415 - see the top

                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
                if name == "config":
                    hint = "write the fields themselves, such as port=0"
                raise ConfigError(f"unknown setting {name!r}: {hint}")

    def with_settings(self, settings: Mapping[str, Any]) -> Self:
        """Returns these settings, with others in the place of those that the keyword arguments name.

        Raises:
            ConfigError: as `from_settings` does.
        """
        self.check_names(settings)
        return replace(self, **settings) if settings else self

    def with_run_name(self, name: str | None) -> Self:
        """Returns these settings with another name of the run."""
        return replace(self, run_name=name)

    def log_path(self, default: Path) -> Path:
        """Returns the directory for the step log: `log_dir`, else `default`."""
        from pathlib import Path  # noqa: PLC0415 - see the top

        return default if self.log_dir is None else Path(self.log_dir)


def check_otlp_endpoint(name: str, endpoint: object) -> None:
    """Checks the address of a collector.

    Raises:
        ConfigError: it is neither `env` nor an address that HTTP can be spoken with.
    """
    if endpoint == "env":
        return
    if isinstance(endpoint, str):
        from urllib.parse import urlsplit  # noqa: PLC0415 - see the top

        with suppress(ValueError):
            parts = urlsplit(endpoint)
            if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
                return
    raise ConfigError(f"{name} must be an address such as http://localhost:4318, or env, got {endpoint!r}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        meant = _meant_int(name, value)
        hint = _write(meant) if meant is not None and low <= meant <= high else ""
        raise ConfigError(f"{name} must be {low}..{high}, got {value!r}{hint}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        meant = None
        if isinstance(value, str):
            with suppress(ValueError):
                meant = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        hint = _write(meant) if meant is not None and low <= meant <= high else ""
        raise ConfigError(f"{name} must be {low}..{high}, got {value!r}{hint}")


def _meant_int(name: str, value: object) -> int | None:
    """Returns the whole number that a text, a size such as 24GiB, or a float such as 12e9 means; None for none."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
        if name.endswith("_bytes"):
            with suppress(ConfigError):
                return parse_bytes(value)
    return None


def _write(meant: object) -> str:
    """Returns what to write, as the end of a message; nothing where that is not known."""
    return "" if meant is None else f": write {meant}"
