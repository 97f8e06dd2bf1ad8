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


def packages_of(what: str) -> _PackagesOf:
    """Returns a context that says what to install where a package is missing that something needs.

    Args:
        what: what needs it, as the message begins.

    Raises:
        MissingPackageError: within the context, one of `INSTALL` is not there.
    """
    return _PackagesOf(what)


class _PackagesOf:
    """What `packages_of` returns; written out, since `memtrace run` would wait for `contextlib` to load.

    Args:
        what: see `packages_of`.
    """

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        """Does nothing."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Puts a message in the place of an import that has failed."""
        if isinstance(error, ModuleNotFoundError):
            package = (error.name or "").partition(".")[0]
            if package in INSTALL:
                message = f"{self._what} needs {package}, which is not installed: {INSTALL[package]}"
                raise MissingPackageError(message, name=package) from error
