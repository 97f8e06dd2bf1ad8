"""Packages that only some of memtrace needs, and how each is had. torch is one: its builds are the user's to choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from memtrace.errors import MissingPackageError

INSTALL = {
    "accelerate": "pip install 'torch-memtrace[transformers]'",
    "lightning": "pip install 'torch-memtrace[lightning]'",
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
