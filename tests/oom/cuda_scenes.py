"""Synthetic moments of failure on a CUDA device: hand-made allocator snapshots, and what is known of their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memtrace.attribution.hidden import HiddenBuffers
from memtrace.oom.advice import ModelFacts
from memtrace.oom.composition import StepFacts, from_blocks
from memtrace.oom.fragmentation import parse_fragmentation
from memtrace.oom.scene import Scene, describe
from memtrace.record.breakdown import AllocatorReading, BatchShape, DeviceReading
from memtrace.record.categories import Category, Phase
from memtrace.record.oom.report import FailedRequest, OomReport, RemedyKind, Witness
from memtrace.record.snapshot import RunIdentity, Snapshot
from memtrace.sources.cuda.allocator import live_blocks
from memtrace.sources.events import Tag, TagEvent

MIB, GIB = 2**20, 2**30

WEIGHTS = Tag(Category.WEIGHTS, "trainable", "bfloat16")
WEIGHTS_32 = Tag(Category.WEIGHTS, "trainable", "float32")
FROZEN = Tag(Category.WEIGHTS, "frozen", "bfloat16")
MASTERS = Tag(Category.MASTER_WEIGHTS, "", "float32")
GRADIENTS = Tag(Category.GRADIENTS, "", "bfloat16")
GRADIENTS_32 = Tag(Category.GRADIENTS, "", "float32")
EXP_AVG = Tag(Category.OPTIMIZER_STATE, "exp_avg", "float32")
EXP_AVG_SQ = Tag(Category.OPTIMIZER_STATE, "exp_avg_sq", "float32")
INPUTS = Tag(Category.INPUTS, "", "float32")
BUCKETS = Tag(Category.COMM_BUFFERS, "reduce", "bfloat16")
SAVED = Tag(Category.ACTIVATIONS, "", "bfloat16")
CASTS = Tag(Category.TRANSIENT_WEIGHTS, "autocast", "bfloat16")
UNKNOWN = None
"""A block that nobody has tagged."""

Held = tuple[Tag | None, int, int]
"""Tag, number of blocks, bytes of each."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A device at the moment of a failure, and what the report of it must say."""

    name: str
    phase: Phase
    held: Sequence[Held]
    top: Category
    """The largest category."""
    remedy: RemedyKind | None
    """What saves most; None where nothing helps."""
    before_forward: int | None = None
    """The allocator's requested bytes before the forward pass."""
    micro_batches: int = 1
    traced: bool = False
    free_pieces: Sequence[int] = ()
    """Free blocks within segments that are in use."""
    hidden: Sequence[HiddenBuffers] = ()
    request: int = 2 * GIB
    free: int = GIB
    other_processes: int | None = None
    world_size: int = 1
    facts: ModelFacts = field(default_factory=lambda: ModelFacts(repeated_blocks=32))

    @property
    def live_bytes(self) -> int:
        """Bytes of all live blocks."""
        return sum(count * size for _, count, size in self.held)


CASES = (
    Case(
        name="activations of a long batch, step not traced",
        phase=Phase.FORWARD,
        held=[
            (WEIGHTS_32, 32, 64 * MIB),
            (EXP_AVG, 32, 64 * MIB),
            (EXP_AVG_SQ, 32, 64 * MIB),
            (UNKNOWN, 600, 32 * MIB),
        ],
        before_forward=6 * GIB,
        top=Category.ACTIVATIONS,
        remedy=RemedyKind.CHECKPOINTING,
    ),
    Case(
        name="activations of a long batch, step traced",
        phase=Phase.FORWARD,
        held=[(WEIGHTS, 32, 64 * MIB), (SAVED, 600, 32 * MIB), (UNKNOWN, 10, 32 * MIB)],
        before_forward=2 * GIB,
        traced=True,
        top=Category.ACTIVATIONS,
        remedy=RemedyKind.CHECKPOINTING,
    ),
    Case(
        name="activations in the backward pass, gradients arriving",
        phase=Phase.BACKWARD,
        held=[(WEIGHTS, 32, 64 * MIB), (GRADIENTS, 16, 64 * MIB), (UNKNOWN, 300, 32 * MIB)],
        before_forward=2 * GIB,
        top=Category.ACTIVATIONS,
        remedy=RemedyKind.CHECKPOINTING,
    ),
    Case(
        name="activations in spite of checkpointing",
        phase=Phase.BACKWARD,
        held=[(WEIGHTS, 32, 64 * MIB), (UNKNOWN, 300, 32 * MIB)],
        before_forward=2 * GIB,
        facts=ModelFacts(repeated_blocks=32, checkpointing=True),
        top=Category.ACTIVATIONS,
        remedy=RemedyKind.SMALLER_MICRO_BATCH,
    ),
    Case(
        name="activations of the second micro batch, gradients kept from the first",
        phase=Phase.FORWARD,
        held=[(WEIGHTS, 32, 64 * MIB), (GRADIENTS, 32, 64 * MIB), (UNKNOWN, 300, 32 * MIB)],
        before_forward=4 * GIB,
        micro_batches=2,
        top=Category.ACTIVATIONS,
        remedy=RemedyKind.CHECKPOINTING,
    ),
    Case(
        name="optimizer state of Adam, made in the first step",
        phase=Phase.OPTIMIZER,
        held=[
            (WEIGHTS_32, 32, 256 * MIB),
            (GRADIENTS_32, 32, 256 * MIB),
            (EXP_AVG, 32, 256 * MIB),
            (EXP_AVG_SQ, 8, 256 * MIB),
        ],
        before_forward=8 * GIB,
        top=Category.OPTIMIZER_STATE,
        remedy=RemedyKind.SHARDING,
    ),
    Case(
        name="optimizer state, sharded already",
        phase=Phase.OPTIMIZER,
        held=[
            (WEIGHTS_32, 4, 256 * MIB),
            (GRADIENTS_32, 4, 256 * MIB),
            (EXP_AVG, 32, 256 * MIB),
            (EXP_AVG_SQ, 32, 256 * MIB),
        ],
        before_forward=17 * GIB,
        world_size=8,
        facts=ModelFacts(repeated_blocks=32, sharded=True),
        top=Category.OPTIMIZER_STATE,
        remedy=RemedyKind.EIGHT_BIT_OPTIMIZER,
    ),
    Case(
        name="master weights of a bf16 model under plain SGD",
        phase=Phase.FORWARD,
        held=[(WEIGHTS, 32, 256 * MIB), (MASTERS, 32, 512 * MIB), (UNKNOWN, 10, 32 * MIB)],
        before_forward=24 * GIB,
        top=Category.MASTER_WEIGHTS,
        remedy=RemedyKind.SHARDING,
        world_size=4,
    ),
    Case(
        name="frozen weights under LoRA",
        phase=Phase.FORWARD,
        held=[
            (FROZEN, 64, 256 * MIB),
            (WEIGHTS_32, 64, MIB),
            (EXP_AVG, 64, MIB),
            (EXP_AVG_SQ, 64, MIB),
            (UNKNOWN, 60, 32 * MIB),
        ],
        before_forward=64 * 259 * MIB,
        top=Category.WEIGHTS,
        remedy=RemedyKind.SHARDING,
    ),
    Case(
        name="gradients in fp32 beside bf16 weights",
        phase=Phase.BACKWARD,
        held=[(WEIGHTS, 32, 128 * MIB), (GRADIENTS_32, 32, 256 * MIB), (UNKNOWN, 20, 64 * MIB)],
        before_forward=4 * GIB,
        top=Category.GRADIENTS,
        remedy=RemedyKind.SHARDING,
    ),
    Case(
        name="temporaries of AdamW with foreach",
        phase=Phase.OPTIMIZER,
        held=[
            (WEIGHTS, 32, 256 * MIB),
            (GRADIENTS, 32, 256 * MIB),
            (Tag(Category.OPTIMIZER_STATE, "exp_avg", "bfloat16"), 16, 256 * MIB),
            (UNKNOWN, 33, 512 * MIB),
        ],
        before_forward=8 * GIB,
        facts=ModelFacts(repeated_blocks=32, foreach=True),
        top=Category.TEMPORARIES,
        remedy=RemedyKind.NO_FOREACH,
    ),
    Case(
        name="a leak of one tensor a step",
        phase=Phase.FORWARD,
        held=[(WEIGHTS, 32, 64 * MIB), (UNKNOWN, 900, 10 * MIB), (UNKNOWN, 20, 32 * MIB)],
        before_forward=32 * 64 * MIB + 900 * 10 * MIB,
        top=Category.UNATTRIBUTED,
        remedy=RemedyKind.UNATTRIBUTED,
    ),
    Case(
        name="everything unclaimed, between two steps",
        phase=Phase.OUTSIDE,
        held=[(WEIGHTS, 32, 64 * MIB), (UNKNOWN, 1, 20 * GIB)],
        top=Category.UNATTRIBUTED,
        remedy=RemedyKind.UNATTRIBUTED,
    ),
    Case(
        name="casts of the weights that autocast keeps",
        phase=Phase.FORWARD,
        held=[(FROZEN, 32, 8 * MIB), (CASTS, 32, 256 * MIB), (SAVED, 20, 32 * MIB)],
        before_forward=256 * MIB,
        traced=True,
        top=Category.TRANSIENT_WEIGHTS,
        remedy=RemedyKind.SMALLER_MICRO_BATCH,
    ),
    Case(
        name="reduction buckets",
        phase=Phase.BACKWARD,
        held=[(WEIGHTS, 8, 64 * MIB), (BUCKETS, 8, GIB), (UNKNOWN, 10, 64 * MIB)],
        before_forward=8 * 64 * MIB + 8 * GIB,
        facts=ModelFacts(repeated_blocks=32, sharded=True),
        world_size=8,
        top=Category.COMM_BUFFERS,
        remedy=RemedyKind.SMALLER_MICRO_BATCH,
    ),
    Case(
        name="buckets that DDP shows nobody",
        phase=Phase.BACKWARD,
        held=[(WEIGHTS, 8, 64 * MIB), (UNKNOWN, 4, 800 * MIB), (UNKNOWN, 10, 64 * MIB)],
        hidden=[
            HiddenBuffers(
                tag=Tag(Category.COMM_BUFFERS, "reduce", "float32"), first=[800 * MIB] * 4, current=[800 * MIB] * 4
            )
        ],
        before_forward=8 * 64 * MIB + 4 * 800 * MIB,
        facts=ModelFacts(repeated_blocks=32, sharded=True),
        top=Category.COMM_BUFFERS,
        remedy=RemedyKind.SMALLER_MICRO_BATCH,
    ),
    Case(
        name="a batch of videos",
        phase=Phase.FORWARD,
        held=[(WEIGHTS, 8, 64 * MIB), (INPUTS, 1, 12 * GIB), (UNKNOWN, 10, 64 * MIB)],
        before_forward=8 * 64 * MIB + 12 * GIB,
        facts=ModelFacts(),
        top=Category.INPUTS,
        remedy=RemedyKind.SMALLER_MICRO_BATCH,
    ),
    Case(
        name="weights, with as much again in free pieces",
        phase=Phase.OPTIMIZER,
        held=[(FROZEN, 40, 100 * MIB)],
        before_forward=40 * 100 * MIB,
        free_pieces=[100 * MIB] * 40,
        top=Category.WEIGHTS,
        remedy=RemedyKind.EXPANDABLE_SEGMENTS,
    ),
    Case(
        name="another process on the device",
        phase=Phase.FORWARD,
        held=[(FROZEN, 40, 100 * MIB), (UNKNOWN, 10, 64 * MIB)],
        before_forward=40 * 100 * MIB,
        other_processes=60 * GIB,
        top=Category.WEIGHTS,
        remedy=RemedyKind.OTHER_PROCESSES,
    ),
)


def snapshot_of(case: Case) -> list[dict[str, Any]]:
    """Returns the allocator's segments: one a tag, with the free pieces between the blocks of the first."""
    segments = []
    for number, (_, count, size) in enumerate(case.held):
        address = begin = (number + 1) << 40
        blocks: list[dict[str, Any]] = []
        free_pieces = list(case.free_pieces) if number == 0 else []
        for _ in range(count):
            rounded = -(-size // 512) * 512
            blocks.append({"address": address, "size": rounded, "requested_size": size, "state": "active_allocated"})
            address += rounded
            if free_pieces:
                piece = free_pieces.pop()
                blocks.append({"address": address, "size": piece, "requested_size": 0, "state": "inactive"})
                address += piece
        segments.append(
            {"device": 0, "address": begin, "total_size": address - begin, "is_expandable": False, "blocks": blocks}
        )
    segments.append(  # another device's: no part of any answer
        {
            "device": 1,
            "address": 1 << 60,
            "total_size": 64 * GIB,
            "blocks": [{"address": 1 << 60, "size": 64 * GIB, "requested_size": 64 * GIB, "state": "active_allocated"}],
        }
    )
    return segments


def known_of(case: Case) -> list[TagEvent]:
    """Returns the tags, with those of tensors that are gone and whose addresses hold something else now."""
    known = [
        TagEvent(0, ((number + 1) << 40) + at * (-(-size // 512) * 512), size, tag)
        for number, (tag, count, size) in enumerate(case.held)
        if tag is not None and not (number == 0 and case.free_pieces)
        for at in range(count)
    ]
    if case.free_pieces:
        address = 1 << 40
        tag, count, size = case.held[0]
        for piece in case.free_pieces[:count]:
            known.append(TagEvent(0, address, size, tag))
            address += -(-size // 512) * 512 + piece
    if case.traced:
        known += [TagEvent(0, found.address, 512, SAVED) for found in known if found.tag == SAVED]
        known.append(TagEvent(0, 7 << 50, 5 * GIB, SAVED))
    return known


def report_of(case: Case) -> OomReport:
    """Returns the report of a case, made as on a device: from segments, tags and counters."""
    segments = snapshot_of(case)
    facts = StepFacts(
        phase=case.phase,
        requested_before_forward=case.before_forward,
        micro_batches=case.micro_batches,
        traced=case.traced,
    )
    holdings, estimated = from_blocks(live_blocks(segments, 0), known_of(case), case.hidden, facts)
    slack = sum(case.free_pieces)
    return describe(
        Scene(
            unix_seconds=1700000000.123,
            request=FailedRequest(
                witness=Witness.ALLOCATOR, phase=case.phase, requested_bytes=case.request, free_bytes=case.free
            ),
            snapshot=Snapshot(
                identity=RunIdentity(run_name="llama", world_size=case.world_size, device="cuda:0"),
                device_memory=DeviceReading(
                    total_bytes=80 * GIB, free_bytes=case.free, other_processes_bytes=case.other_processes
                ),
            ),
            holdings=holdings,
            complete=True,
            estimated=estimated,
            facts=case.facts,
            step=7,
            batch=BatchShape(shape=(8, 4096), tokens=32768, largest_micro_batch_tokens=32768),
            allocator=AllocatorReading(
                allocated_bytes=case.live_bytes,
                reserved_bytes=case.live_bytes + slack,
                requested_bytes=case.live_bytes,
                ooms=1,
            ),
            fragmentation=parse_fragmentation(segments, 0, {found.address: found.key for found in holdings}),
        )
    )
