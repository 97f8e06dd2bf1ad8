"""Every error that memtrace raises on purpose.

    MemTraceError
    ├── ConfigError (also ValueError)    a setting, or what was handed to a constructor, cannot be used
    ├── DeviceUnavailable                nobody can be asked about a device; stays inside the package
    ├── LogFormatError (also ValueError) a step log, plan file or snapshot cannot be read
    ├── MissingPackageError (also ImportError)  a package is not installed that something needs
    ├── OutputError (also OSError)       a port, directory or file that was asked for cannot be used
    └── PlanError (also ValueError)      a plan cannot be made from what was given

The message says what was wrong, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MemTraceError(Exception):
    """Base of all errors that memtrace raises on purpose."""


class ConfigError(MemTraceError, ValueError):
    """A setting, model or optimizer cannot be used; raised before training starts."""


class DeviceUnavailable(MemTraceError):
    """Nobody can be asked about a device: no driver, or a driver that does not know it."""


class LogFormatError(MemTraceError, ValueError):
    """A file does not have the documented form."""


class MissingPackageError(MemTraceError, ImportError):
    """A package is not installed that only this part of memtrace needs."""


class OutputError(MemTraceError, OSError):
    """An output that was asked for (port, directory, file) cannot be opened."""


class PlanError(MemTraceError, ValueError):
    """A plan cannot be made from the given model, configuration or options."""


INSTALL = {
    "accelerate": "pip install 'torch-memtrace[transformers]'",
    "lightning": "pip install 'torch-memtrace[lightning]'",
    "opentelemetry": "pip install 'torch-memtrace[otlp]'",
    "plotly": "pip install 'torch-memtrace[report]'",
    "torch": "pip install torch, or the build for your device that https://pytorch.org/get-started names",
    "transformers": "pip install 'torch-memtrace[transformers]'",
}


@contextmanager
def packages_of(what: str) -> Iterator[None]:
    """Says what to install where a package is missing that something needs.

    Args:
        what: what needs it, as the message begins.

    Raises:
        MissingPackageError: one of `INSTALL` is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in INSTALL:
            raise
        message = f"{what} needs {package}, which is not installed: {INSTALL[package]}"
        raise MissingPackageError(message, name=package) from error
