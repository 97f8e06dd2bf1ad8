"""Lets FSDP2 of torch 2.6 train on a CPU, where it lacks what it needs there; later versions are left as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group


def let_fsdp_train() -> None:
    """Gives torch's stand-in for a stream the two calls that it lacks, and lets gathered weights keep their version."""
    if hasattr(torch.cpu.Stream, "record_event"):
        return
    torch.cpu.Stream.record_event = torch.cpu.Stream.wait_event = lambda *_: None
    copy_out = _fsdp_param_group.foreach_all_gather_copy_out

    def keeps_versions(result: Any, parameters: list[Any], group: Any) -> None:
        versions = {id(tensor): tensor._version for one in parameters for tensor in one.all_gather_outputs}
        copy_out(result, parameters, group)
        gathered = [tensor for one in parameters for tensor in one.all_gather_outputs]
        kept = [versions.get(id(tensor), tensor._version) for tensor in gathered]
        for tensor, version in zip(gathered, kept, strict=True):
            torch._C._autograd._unsafe_set_version_counter(tensor, version)

    _fsdp_param_group.foreach_all_gather_copy_out = keeps_versions
