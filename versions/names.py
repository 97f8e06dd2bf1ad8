"""The private names of torch that memtrace uses, with their older spellings and what is lost where there is none.

`python -m versions.names` says which of them the installed torch has; a table of that for each row is committed, and
the tests hold the code against it. Needs torch and nothing of memtrace.
"""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PrivateName:
    """One thing that memtrace asks torch for without a public call."""

    spellings: tuple[str, ...]
    """Where it is, the newest first: a dotted name, or `file:attribute` for what objects have, by torch's source."""
    without: str = ""
    """What users do without where there is none; empty where memtrace needs it."""


def _named(*spellings: str, without: str = "") -> PrivateName:
    return PrivateName(spellings, without)


_GROUP = "torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py"
_STATE = "torch/distributed/fsdp/_fully_shard/_fsdp_state.py"
_PARAMETER = "torch/distributed/fsdp/_fully_shard/_fsdp_param.py"
_FLAT = "torch/distributed/fsdp/_flat_param.py"
_MODULE = "torch/nn/modules/module.py"
AS_ABOVE = "the same"
_NO_CUDA = "what CUDA's allocator records: it is absent from builds without CUDA alone"
_BY_MODULE = "the module of blocks of the backward pass, in plans by module and in `memtrace check`"
_GATHERED_1 = "copies that FSDP1 gathers in this form"
_BUFFERS = "buffers of FSDP2's collectives that are kept in this form"

NAMES = (
    _named(
        "torch._C._autograd._top_saved_tensors_default_hooks",
        without="hooks on saved tensors around the whole model, where two or more of them are there at once: what is "
        "saved then is known by its life; looking for them takes some 10 ms in a traced step",
    ),
    _named("torch._C._autograd._push_saved_tensors_default_hooks"),
    _named("torch._C._autograd._pop_saved_tensors_default_hooks"),
    _named("torch._C._autograd._saved_tensors_hooks_is_enabled"),
    _named(
        "torch._C._autograd._push_node_creation_hook",
        without="element types of what `torch.func.grad` and its kind save inside a forward pass: that is known by its "
        "life",
    ),
    _named("torch._C._autograd._pop_node_creation_hook", without=AS_ABOVE),
    _named("torch._C._current_autograd_node"),
    _named("torch._C._current_graph_task_id"),
    _named("torch._C._autograd._get_sequence_nr", without=_BY_MODULE),
    _named("torch._C._functions.AccumulateGrad._sequence_nr", without=_BY_MODULE),
    _named("torch.jit._recursive", without="`torch.jit.script` of a model that is watched, which raises"),
    _named("torch._dynamo.eval_frame.skip_code"),
    _named("torch/_dynamo/eval_frame.py:_torchdynamo_disable"),
    _named("torch/_dynamo/decorators.py:_dynamo_marked_constant"),
    _named("torch._C._get_dispatch_mode"),
    _named("torch._C._TorchDispatchModeKey"),
    _named("torch._C._is_tracing"),
    _named("torch._C._functorch.is_functorch_wrapped_tensor"),
    _named("torch._C._storage_Use_Count"),
    _named("torch._C._disabled_torch_function_impl"),
    _named("torch._C._DisableTorchDispatch"),
    _named("torch._ops.OpOverload"),
    _named("torch.Tensor._is_zerotensor"),
    _named("torch.Tensor._indices"),
    _named("torch.Tensor._values"),
    _named("torch.Tensor._make_subclass"),
    _named("torch.Tensor._use_count"),
    _named("torch.Tensor._fix_weakref"),
    _named("torch.UntypedStorage._fix_weakref"),
    _named("torch.UntypedStorage._cdata"),
    _named("torch.Tensor._backward_hooks"),
    _named("torch.Tensor._post_accumulate_grad_hooks", "torch/_tensor.py:_post_accumulate_grad_hooks"),
    _named("torch.autograd.Variable._execution_engine"),
    _named("torch/distributed/optim/apply_optimizer_in_backward.py:_in_backward_optimizers"),
    _named(f"{_MODULE}:_parameters"),
    _named(f"{_MODULE}:_buffers"),
    _named(f"{_MODULE}:_modules"),
    _named(f"{_MODULE}:_forward_pre_hooks"),
    _named(f"{_MODULE}:_forward_hooks"),
    _named(f"{_MODULE}:_forward_pre_hooks_with_kwargs"),
    _named(f"{_MODULE}:_forward_hooks_with_kwargs"),
    _named(f"{_MODULE}:_forward_hooks_always_called"),
    _named("torch/distributed/tensor/_api.py:_local_tensor"),
    _named("torch.autograd._prepare_profiler"),
    _named("torch.autograd._enable_profiler"),
    _named("torch.autograd._disable_profiler"),
    _named("torch.autograd._enable_record_function"),
    _named("torch.autograd._profiler_enabled"),
    _named("torch.autograd.profiler._is_profiler_enabled"),
    _named("torch.autograd.profiler.KinetoStepTracker._step_dict"),
    _named("torch._C._profiler._ExperimentalConfig"),
    _named("torch._C._profiler._ProfilerEvent"),
    _named("torch._C._profiler._ExtraFields_Allocation"),
    _named("torch.cuda.memory._record_memory_history"),
    _named("torch.cuda.memory._snapshot"),
    _named("torch._C._cuda_isHistoryEnabled", without=_NO_CUDA),
    _named("torch._C._cuda_annotateMemory", without="`annotate_snapshots`, which one warning says"),
    _named("torch._C._cuda_memorySnapshot", without=_NO_CUDA),
    _named("torch._C._cuda_attach_out_of_memory_observer", without=_NO_CUDA),
    _named("torch.distributed.fsdp.FSDPModule._get_fsdp_state"),
    _named(f"{_STATE}:_fsdp_param_groups", f"{_STATE}:_fsdp_param_group"),
    _named(f"{_GROUP}:_all_gather_result", without=_BUFFERS),
    _named(f"{_GROUP}:_all_reduce_state", without=_BUFFERS),
    _named(f"{_PARAMETER}:_unsharded_param"),
    _named("torch/distributed/fsdp/fully_sharded_data_parallel.py:_handle"),
    _named(f"{_FLAT}:_local_shard"),
    _named(f"{_FLAT}:_fwd_bwd_param_dtype"),
    _named(f"{_FLAT}:_params"),
    _named(f"{_FLAT}:_full_param_padded", without=_GATHERED_1),
    _named(f"{_FLAT}:_full_prec_full_param_padded", without=_GATHERED_1),
    _named(f"{_FLAT}:_mp_shard", without=_GATHERED_1),
    _named(f"{_FLAT}:_saved_grad_shard", without="gradients that FSDP1 keeps in this form"),
    _named(f"{_FLAT}:_cpu_grad", without="gradients that FSDP1 keeps in this form"),
    _named("torch.nn.parallel.DistributedDataParallel._get_active_ddp_module"),
    _named("torch.nn.parallel.DistributedDataParallel._get_ddp_logging_data"),
    _named(
        "torch/nn/parallel/distributed.py:_has_rebuilt_buckets",
        without="on a CPU, the buckets of DDP in a trace of the step in which they are rebuilt",
    ),
    _named("torch/nn/parallel/distributed.py:_comm_hooks", without="what communication hooks of DDP keep"),
)


def has(spelling: str) -> bool:
    """Returns whether the installed torch has a name."""
    if ":" in spelling:
        path, _, attribute = spelling.partition(":")
        source = Path(importlib.import_module("torch").__file__ or "").parent.parent / path
        return source.exists() and re.search(rf"\b{attribute}\b", source.read_text()) is not None
    first, *rest = spelling.split(".")
    found, so_far = importlib.import_module(first), first
    for part in rest:
        so_far += f".{part}"
        if not hasattr(found, part):
            try:
                importlib.import_module(so_far)
            except ImportError:
                return False
        found = getattr(found, part, None)  # type: ignore[assignment]
    return True


if __name__ == "__main__":
    print(json.dumps({spelling: has(spelling) for name in NAMES for spelling in name.spellings}))
