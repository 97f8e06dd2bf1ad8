"""A case: one training step that the gate plans, and what may grow of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from memtrace.errors import ConfigError
from memtrace.planning.sharding.shares import Offload, Sharding, Strategy
from memtrace.record.units import parse_bytes

ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
"""A function of Python code, such as `package.module:function`."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,79}")
_SHARE = re.compile(r"(\d+(?:\.\d+)?) ?%")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """By how much a total of a case may grow before the check fails."""

    nbytes: int = 0
    share: float = 0.0
    """Of what it was before."""

    @classmethod
    def of(cls, value: object) -> Tolerance:
        """Returns what a number of bytes, a size such as `64MiB` or a share such as `1%` stands for.

        Raises:
            ConfigError: it is none of them.
        """
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return cls(nbytes=value)
        if isinstance(value, str):
            share = _SHARE.fullmatch(value.strip())
            if share or not value.strip().endswith("%"):
                return cls(share=float(share[1]) / 100) if share else cls(nbytes=parse_bytes(value))
        raise ConfigError(f"tolerance must be a size such as 64MiB or a share such as '1%', got {value!r}")

    def allows(self, before: int, now: int) -> bool:
        """Returns whether a total may be `now` where it was `before`; less is always allowed."""
        return now - before <= max(self.nbytes, int(self.share * before))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is planned: a configuration of transformers or a function that makes the model, and how it is trained.

    The fields are the keys of the case in its file, with the names of the options of `memtrace plan`.
    """

    name: str
    config: str | None = None
    """A config.json, a directory that has one, or a name on the hub; paths begin at the file of cases."""
    build: str | None = None
    """In place of `config`: a function that returns the model, such as `package.module:function`."""
    batch: str | None = None
    """A function that returns a micro batch for `build`; a model of transformers needs none."""
    loss: str | None = None
    """A function of (model, batch) that returns the loss for `build`; by default what the model returns as `loss`."""
    recipe: str = "bf16-master"
    optimizer: str = "adamw"
    """A name, or with `build` a function that makes one for a list of parameters."""
    batch_size: int = 1
    seq_len: int | None = None
    """By default 2048, or as many positions as the model has."""
    image_size: int | None = None
    padded: bool = False
    accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    attn: str | None = None
    dtype: str | None = None
    lora_rank: int | None = None
    lora_targets: str | None = None
    keep_outputs: bool = False
    fused_optimizer: bool = False
    sharding: str = Strategy.NONE.value
    """One of none, ddp, zero0 to zero3, fsdp."""
    world_size: int = 1
    offload: str = Offload.NONE.value
    deepspeed: str | None = None
    """In place of `sharding`: a configuration of DeepSpeed."""
    device: str = "cuda"
    """`cuda` or `cpu`: whose kernels; the name of a GPU, such as H200, counts what libraries keep on that one."""
    tolerance: Tolerance = Tolerance()

    def __post_init__(self) -> None:
        if _NAME.fullmatch(self.name) is None:
            raise ConfigError(f"the name of a case must be letters, digits, '.', '_' and '-', got {self.name!r}")
        if (self.config is None) == (self.build is None):
            raise ConfigError(f"case {self.name}: give it either config or build, not both and not neither")
        for key in ("build", "batch", "loss"):
            value = getattr(self, key)
            if value is not None and ENTRY_POINT.fullmatch(value) is None:
                raise ConfigError(f"case {self.name}: {key} must be such as package.module:function, got {value!r}")
        wrong = _OF_A_BUILD if self.build is None else _OF_A_CONFIGURATION
        for key in wrong:
            if getattr(self, key) not in (None, False):
                other = "config" if self.build is None else "build"
                raise ConfigError(f"case {self.name}: {key} does not go together with {other}")
        for key, usual in _OF_A_USUAL_BATCH.items():
            if self.batch is not None and getattr(self, key) != usual:
                raise ConfigError(
                    f"case {self.name}: {key} has no meaning where the function {self.batch} makes the batch"
                )

    def shared(self) -> Sharding:
        """Returns who holds which share of the model, where no configuration of DeepSpeed says it.

        Raises:
            ConfigError: a word has no meaning.
            PlanError: two settings do not go together.
        """
        for key, words in (("sharding", Strategy), ("offload", Offload)):
            if getattr(self, key) not in tuple(words):
                known = ", ".join(words)
                raise ConfigError(f"case {self.name}: {key} must be one of {known}, got {getattr(self, key)!r}")
        return Sharding(strategy=Strategy(self.sharding), world_size=self.world_size, offload=Offload(self.offload))


_OF_A_USUAL_BATCH = {"batch_size": 1, "seq_len": None, "image_size": None, "padded": False}
"""Keys that say how large a batch is, with their values where they are not given."""
_OF_A_BUILD = ("batch", "loss")
_OF_A_CONFIGURATION = ("gradient_checkpointing", "attn", "dtype", "lora_rank", "lora_targets", "fused_optimizer")
"""Keys that go with one of `build` and `config` only: a function makes its model as it likes it."""
