"""What blocks are for by the code that allocated them, where stacks were recorded: one table of rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from functools import cache
from typing import NamedTuple

from memtrace.forensics.attribution.labels import Label
from memtrace.forensics.attribution.lives import Lives
from memtrace.forensics.history import History
from memtrace.forensics.trace import Frame, Stacks
from memtrace.record.categories import Category
from memtrace.record.readings.snapshot_reading import Source


class Lasting(Enum):
    """Which blocks a rule is about."""

    ANY = "any"
    PERSISTENT = "persistent"
    """Those that outlive steps."""
    OF_A_STEP = "of a step"


class Rule(NamedTuple):
    """Blocks that were allocated below a function are for something."""

    file: str
    """End of the file's path; empty for any."""
    function: str
    """The function's name, or of C++ a part of it; empty for any."""
    lasting: Lasting
    category: Category
    component: str
    seen: str
    """Versions of the package in whose source the function was found."""


_TORCH = "torch 2.6 to 2.15"
_ANY, _KEPT, _SHORT = Lasting.ANY, Lasting.PERSISTENT, Lasting.OF_A_STEP

RULES: Sequence[Rule] = (
    Rule("", "allocateCublasWorkspace", _ANY, Category.WORKSPACES, "cublas", "torch 2.8 to 2.15, C++"),
    Rule("", "getCUDABlasLtWorkspace", _ANY, Category.WORKSPACES, "cublas", "torch 2.8 to 2.15, C++"),
    Rule("", "getCurrentCUDABlasHandle", _KEPT, Category.WORKSPACES, "cublas", "torch 2.6 to 2.15, C++"),
    Rule("", "autocast::cached_cast", _SHORT, Category.TRANSIENT_WEIGHTS, "autocast", "torch 2.6 to 2.15, C++"),
    Rule("", "c10d::Reducer::", _KEPT, Category.COMM_BUFFERS, "", "torch 2.6 to 2.15, C++"),
    Rule("torch/nn/parallel/distributed.py", "_ddp_init_helper", _KEPT, Category.COMM_BUFFERS, "", _TORCH),
    Rule("_fsdp_collectives.py", "foreach_all_gather", _SHORT, Category.TRANSIENT_WEIGHTS, "all_gather", _TORCH),
    Rule("_fsdp_collectives.py", "foreach_reduce", _SHORT, Category.COMM_BUFFERS, "", _TORCH),
    Rule("torch/optim/", "_init_group", _KEPT, Category.OPTIMIZER_STATE, "", _TORCH),
    Rule("torch/optim/", "", _SHORT, Category.TEMPORARIES, "optimizer", _TORCH),
    Rule("transformers/trainer.py", "_prepare_inputs", _SHORT, Category.INPUTS, "", "transformers 4.50 to 5.17"),
    Rule("accelerate/utils/operations.py", "send_to_device", _SHORT, Category.INPUTS, "", "accelerate 1.1 to 1.14"),
    Rule("", "AccumulateGrad", _ANY, Category.GRADIENTS, "", "torch 2.6 to 2.15, C++"),
    Rule("transformers/modeling_utils.py", "from_pretrained", _KEPT, Category.WEIGHTS, "", "transformers 4.50 to 5.17"),
    Rule("torch/nn/modules/module.py", "_apply", _KEPT, Category.WEIGHTS, "", _TORCH),
)
"""The first one that a stack and the block's life meet counts."""


def labels_by_stack(history: History, lives: Lives, stacks: Stacks) -> dict[int, Label]:
    """Returns what stacks tell, by the index of the block's lifetime."""
    persistent = set(lives.persistent)

    @cache
    def rules_of(stack: int) -> Sequence[Rule]:
        return [*_rules_of(stacks[stack])]

    found = {}
    for index, stack in enumerate(history.stacks):
        if stack < 0:
            continue
        lasting = Lasting.PERSISTENT if index in persistent else Lasting.OF_A_STEP
        rule = next((rule for rule in rules_of(stack) if rule.lasting in (Lasting.ANY, lasting)), None)
        if rule is not None:
            found[index] = Label(rule.category, rule.component, "", Source.STACK)
    return found


def _rules_of(frames: Sequence[Frame]) -> Iterator[Rule]:
    for rule in RULES:
        if any(_meets(rule, frame) for frame in frames):
            yield rule


def _meets(rule: Rule, frame: Frame) -> bool:
    filename = frame.filename.replace("\\", "/")
    in_file = rule.file in filename if rule.file.endswith("/") else filename.endswith(rule.file)
    named = frame.name.rpartition(".")[2] == rule.function if rule.file else rule.function in frame.name
    return in_file and (named or not rule.function)
