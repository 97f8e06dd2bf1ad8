"""What only some versions of torch and transformers have, for tests of exactly that: `@pytest.mark.needs(feature)`.

A test whose feature is not there is skipped with the feature as the reason; the table of versions counts and names
them (docs/versions.md). The development environment has all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields


def _counters_of_every_accelerator() -> bool:
    import torch

    return hasattr(torch.accelerator, "memory_stats")


def _grouped_products() -> bool:
    import torch

    return hasattr(torch, "_grouped_mm")


def _listings_of_one_pool() -> bool:
    import torch

    return "mempool_id" in inspect.signature(torch.cuda.memory_snapshot).parameters


def _fsdp2_without_a_gpu() -> bool:
    import torch

    return hasattr(torch.cpu.Stream, "record_event")


def _optimizers_of_bitsandbytes_on_a_cpu() -> bool:
    import bitsandbytes  # noqa: F401 - registers its operators
    import torch

    name = "bitsandbytes::optimizer_update_8bit_blockwise"
    known = hasattr(torch.ops.bitsandbytes, "optimizer_update_8bit_blockwise")
    return known and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def _sampling_strategies() -> bool:
    import transformers

    return "train_sampling_strategy" in {field.name for field in fields(transformers.TrainingArguments)}


def _muon() -> bool:
    import torch

    return hasattr(torch.optim, "Muon")


def _fsdp2_under_trainer() -> bool:
    import transformers

    return "is_fsdp2" in inspect.getsource(transformers.Trainer)


def _dft_loss() -> bool:
    import trl

    return "loss_type" in {field.name for field in fields(trl.SFTConfig)}


def _trainers_of_trl() -> bool:
    import trl

    return all(hasattr(trl, name) for name in ("DistillationTrainer", "KTOTrainer", "RLOOConfig"))


FEATURES: dict[str, Callable[[], bool]] = {
    "counters of every accelerator": _counters_of_every_accelerator,
    "DFT loss of SFTTrainer": _dft_loss,
    "Muon": _muon,
    "FSDP2 that runs without a GPU": _fsdp2_without_a_gpu,
    "FSDP2 under Trainer": _fsdp2_under_trainer,
    "choice of how Trainer samples": _sampling_strategies,
    "grouped matrix products": _grouped_products,
    "listings of one memory pool": _listings_of_one_pool,
    "optimizers of bitsandbytes on a CPU": _optimizers_of_bitsandbytes_on_a_cpu,
    "trainers of TRL 1.16": _trainers_of_trl,
}


def missing(feature: str) -> bool:
    """Returns whether the torch that is installed does without it."""
    return not FEATURES[feature]()
