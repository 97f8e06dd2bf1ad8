"""The settings of memtrace. The callback, the wrapper and the tracer take the same fields."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from memtrace.errors import ConfigError

DEFAULT_PORT = 16368
"""First port of the metrics server; the local rank is added to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracerConfig:
    """Settings of a tracer. Every field has a default that is right for an ordinary fine-tune.

    Raises:
        ConfigError: a value is out of its range.
    """

    port: int | None = DEFAULT_PORT
    """Port of the Prometheus endpoint on the first local rank; each further local rank takes the next one, and a
    port in use is passed over for the next free one. 0 takes any free port. None opens no port."""
    address: str = "127.0.0.1"
    """Address that the endpoint listens on. Only this machine can reach the default."""
    log_dir: str | os.PathLike[str] | None = None
    """Directory of the step log. None means `<output_dir>/memtrace` under Trainer and `memtrace-runs/<run_name>` in a
    plain loop."""
    step_log: bool = True
    """Whether to write the step log at all."""
    run_name: str | None = None
    """Name of the run in metrics and logs. None means Trainer's run name, else the name of the script."""
    trace_every: int = 100
    """A traced step at least once in so many steps, besides the first one that has optimizer state. 0 traces only
    that first one and those asked for by `trace_next()`; 1 traces every step."""
    device_limit_bytes: int | None = None
    """What the run may use of the device, in bytes. None means all that the device has."""
    device_poll_seconds: float = 1.0
    """Seconds between two readings of the device by the sampling thread. 0 reads at step ends only."""
    history: int = 256
    """How many StepRecords `tracer.history` keeps."""
    strict: bool = False
    """Whether a fault inside memtrace is raised. False logs it once, switches memtrace off and lets training go on;
    True is for tests of memtrace itself."""

    def __post_init__(self) -> None:
        if self.port is not None:
            _check_int("port", self.port, 0, 65535)
        if not isinstance(self.address, str) or not self.address:
            raise ConfigError(f"address must be a host name or an IP address, got {self.address!r}")
        if self.log_dir is not None and not isinstance(self.log_dir, (str, os.PathLike)):
            raise ConfigError(f"log_dir must be a path, got {self.log_dir!r}")
        if self.run_name is not None and (not isinstance(self.run_name, str) or not self.run_name.strip()):
            raise ConfigError(f"run_name must be a text that is not blank, got {self.run_name!r}")
        _check_int("trace_every", self.trace_every, 0, 10**9)
        _check_int("history", self.history, 1, 10**6)
        if self.device_limit_bytes is not None:
            _check_int("device_limit_bytes", self.device_limit_bytes, 1, 2**63 - 1)
        seconds = self.device_poll_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds <= 3600:
            raise ConfigError(f"device_poll_seconds must be 0..3600 seconds, got {seconds!r}")
        for name in ("step_log", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Self:
        """Returns the configuration for keyword arguments that a user wrote.

        Raises:
            ConfigError: a name is not a field (the message proposes the nearest one) or a value is out of range.
        """
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
                raise ConfigError(f"unknown setting {name!r}: {hint}")
        return cls(**settings)

    def log_path(self, default: Path) -> Path:
        """Returns the directory for the step log: `log_dir`, else `default`."""
        return default if self.log_dir is None else Path(self.log_dir)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be {low}..{high}, got {value!r}")
