"""The private calls into torch that show the tensors of FSDP, of both kinds, and the buckets of DDP.

Beside `torch_private`, and by its rules: a missing private name costs a feature, never the run, and each function says
what its caller gets then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch


def fsdp_groups(module: torch.nn.Module) -> list[Any] | None:
    """Returns the parameter groups of a module that `fully_shard` has sharded: no public call shows their tensors.

    Up to torch 2.11 a module has one at most. None where torch has changed: FSDP2 is then attributed by the model and
    the optimizer alone.
    """
    state_of = getattr(module, "_get_fsdp_state", None)
    state = None if state_of is None else state_of()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is not None:
        return list(groups)
    unknown = object()
    group = getattr(state, "_fsdp_param_group", unknown)
    return None if group is unknown else [group] if group is not None else []


def fsdp_contexts(groups: Iterable[Any]) -> list[Any]:
    """Returns what the groups of FSDP2 share for their collectives: one for all from the first forward pass on."""
    contexts = (getattr(group, "comm_ctx", None) for group in groups)
    return list({id(context): context for context in contexts if context is not None}.values())


def fsdp_group_buffers(group: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (collective, buffer) for what one parameter group of FSDP2 keeps for overlap now."""
    yield from _gathered(getattr(group, "_all_gather_result", None))
    reduced = getattr(group, "_all_reduce_state", None)
    if reduced is not None:
        yield "reduce_scatter", reduced.all_reduce_input


def fsdp_context_buffers(context: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (collective, buffer) for what the groups of one context of FSDP2 keep for overlap now."""
    yield from _gathered(getattr(getattr(context, "all_gather_state", None), "all_gather_result", None))
    states = getattr(context, "reduce_scatter_states", None)  # up to torch 2.11 there is one at most
    for state in (getattr(context, "reduce_scatter_state", None),) if states is None else states:
        if state is not None:
            yield "reduce_scatter", state.reduce_scatter_input


def _gathered(result: Any) -> Iterator[tuple[str, torch.Tensor]]:
    output = getattr(result, "all_gather_output", None)
    if isinstance(output, torch.Tensor):
        yield "all_gather", output


def fsdp_gathered_parameter(parameter: Any) -> torch.nn.Parameter | None:
    """Returns the gathered form of a parameter of FSDP2 that autograd sees; None before the first forward pass."""
    return getattr(parameter, "_unsharded_param", None)


class FlatParameter:
    """A flat parameter of FSDP1 with its tensors, as they are whenever they are asked for.

    Args:
        handle: what `FullyShardedDataParallel` keeps for it.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.parameter: torch.nn.Parameter = handle.flat_param
        self.device: torch.device = handle.device

    @property
    def shard(self) -> torch.Tensor:
        """What the optimizer updates: all of it where nothing is sharded."""
        shard = getattr(self.parameter, "_local_shard", None)
        return self.parameter if shard is None else shard

    @property
    def computes_in(self) -> torch.dtype:
        """The element type of the gathered copy."""
        found = getattr(self._handle, "_fwd_bwd_param_dtype", None)
        return self.parameter.dtype if found is None else found

    @property
    def views(self) -> Sequence[torch.Tensor]:
        """The parameters that a module lists in its place, with `use_orig_params`."""
        return getattr(self.parameter, "_params", None) or ()

    def gathered(self) -> list[torch.Tensor]:
        """Returns the copies that forward and backward pass read; their storages are empty between them."""
        names = ("_full_param_padded", "_full_prec_full_param_padded", "_mp_shard")
        return [tensor for name in names if (tensor := getattr(self.parameter, name, None)) is not None]

    def gradients(self) -> list[torch.Tensor]:
        """Returns the gradients that there are now, before their reduction or after it."""
        names = ("grad", "_saved_grad_shard", "_cpu_grad")
        return [tensor for name in names if (tensor := getattr(self.parameter, name, None)) is not None]


def shows_flat_parameter(wrapper: torch.nn.Module) -> bool:
    """Returns whether a `FullyShardedDataParallel` module tells whether it has a flat parameter."""
    return hasattr(wrapper, "_handle")


def flat_parameter(wrapper: torch.nn.Module) -> FlatParameter | None:
    """Returns the flat parameter of a `FullyShardedDataParallel` module: no public call shows its tensors.

    None where the module in it has no parameters of its own, and where torch has changed.
    """
    handle = getattr(wrapper, "_handle", None)
    return None if getattr(handle, "flat_param", None) is None else FlatParameter(handle)


def running_ddp() -> Any:
    """Returns the DistributedDataParallel module whose forward pass runs on this thread; None outside of one."""
    wrapper = torch.nn.parallel.DistributedDataParallel
    running = getattr(wrapper, "_get_active_ddp_module", None)
    return None if running is None else running()


def shows_ddp_buckets(wrapper: Any) -> bool:
    """Returns whether a `DistributedDataParallel` module tells of its buckets."""
    return hasattr(wrapper, "_get_ddp_logging_data")


def ddp_bucket_bytes(wrapper: Any) -> tuple[list[int], list[int]]:
    """Returns the sizes of the reducer's buckets in bytes: those it was built with, and those it rebuilt.

    The second list is empty until the reducer has seen the order of the gradients. Both are empty where torch has
    changed.
    """
    log = getattr(wrapper, "_get_ddp_logging_data", None)
    data = {} if log is None else log()
    first, rebuilt = (
        [int(size) for size in str(data.get(name, "")).split(",") if size.strip()]
        for name in ("bucket_sizes", "rebuilt_bucket_sizes")
    )
    return first, rebuilt


def rebuilds_ddp_buckets(wrapper: Any) -> bool:
    """Returns whether a `DistributedDataParallel` module's reducer is yet to put other buckets in the place of its own.

    It does so once, in the forward pass after the first backward pass, and never where it looks for unused parameters.
    """
    never = getattr(wrapper, "find_unused_parameters", False) and not getattr(wrapper, "static_graph", False)
    return not never and not getattr(wrapper, "_has_rebuilt_buckets", False)


def kept_by_ddp_hooks(wrapper: Any) -> list[Any]:
    """Returns what the communication hooks of a `DistributedDataParallel` module keep in their states, in slots or not;
    nothing where torch has changed."""
    states = [state for _, state in getattr(wrapper, "_comm_hooks", ())]
    names = [(state, *getattr(type(state), "__slots__", ()), *getattr(state, "__dict__", ())) for state in states]
    return [getattr(state, name, None) for state, *own in names for name in own]
