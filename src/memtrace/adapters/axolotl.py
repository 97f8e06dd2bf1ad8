"""The plugin for axolotl: `plugins: [memtrace.adapters.axolotl.MemTracePlugin]` in its YAML. Needs axolotl."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, field_validator
from transformers import TrainerCallback

from memtrace.adapters.hf_trainer import MemTraceCallback
from memtrace.config import TracerConfig

SECTION = "memtrace"
"""Key of the section of axolotl's YAML that has the settings."""


class MemTraceSection(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    memtrace: dict[str, Any] | None = None
    """Fields of `TracerConfig`. Nothing, or an empty section, leaves the defaults."""

    @field_validator(SECTION)
    @classmethod
    def _are_settings(cls, settings: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuses a configuration with settings that cannot be used, before axolotl loads data and model.

        Raises:
            ConfigError: a setting is unknown or out of range; a ValueError, which pydantic shows with its place.
        """
        TracerConfig.from_settings(settings or {})
        return settings


class MemTracePlugin(BasePlugin):  # type: ignore[misc]  # axolotl has no types
    """Adds `MemTraceCallback` to the Trainer that axolotl makes, with the settings of the section `memtrace`.

        plugins:
          - memtrace.adapters.axolotl.MemTracePlugin
        memtrace:
          port: 16400

    The step log goes to `<output_dir>/memtrace`.
    """

    def get_input_args(self) -> str:
        """Returns where axolotl finds the form of the section."""
        return f"{MemTraceSection.__module__}.{MemTraceSection.__qualname__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Returns the callback. Axolotl adds it to the Trainer.

        Args:
            cfg: axolotl's configuration, where a missing key is None.
            trainer: the Trainer, which finds its model and optimizer by itself.
        """
        return [MemTraceCallback(**(cfg.memtrace or {}))]
