"""Snapshots made by hand, in the forms that torch 2.1 to 2.15 give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SEGMENT = 2 << 20
BASE = 0x7F0000000000

FRAMES = [
    {"filename": "train.py", "line": 7, "name": "forward"},
    {"filename": "torch/nn/modules/module.py", "line": 1700, "name": "_call_impl"},
]

ACTIONS = (
    ("segment_alloc", BASE, SEGMENT),
    ("segment_map", BASE + SEGMENT, SEGMENT),
    ("alloc", BASE, 1000),
    ("alloc", BASE + 1024, 512),
    ("annotate", BASE, 1000),
    ("free_requested", BASE, 1000),
    ("free_completed", BASE, 1000),
    ("segment_unmap", BASE + SEGMENT, SEGMENT),
    ("segment_alloc", BASE + 2 * SEGMENT, SEGMENT),
    ("segment_free", BASE + 2 * SEGMENT, SEGMENT),
    ("snapshot", 0, 0),
)
"""Every action but a failed request, with address and bytes."""

VERSIONS = ("2.1", "2.2", "2.6", "2.8", "2.10", "2.11", "2.13", "2.14", "2.15")


def entry(version: tuple[int, int], action: str, address: int, size: int, time_us: int) -> dict[str, Any]:
    """One entry of a history with the fields of a version of torch."""
    found: dict[str, Any] = {"action": action, "addr": address, "size": size, "stream": 0, "frames": FRAMES}
    if version >= (2, 2):
        found["time_us"] = time_us
    if version >= (2, 8):
        found["compile_context"] = "N/A"
    if version >= (2, 10):
        found["user_metadata"] = "weights" if action == "annotate" else ""
    if version >= (2, 11):
        found["forward_frames"] = []
    if version >= (2, 13):
        found["pool_id"] = (0, 0)
    if version >= (2, 15):
        found["internal_metadata"] = ""
    return found


def snapshot(version: str = "2.13") -> dict[str, Any]:
    """A snapshot with every action that a version of torch has, one block in use and one failed request."""
    torch = tuple(map(int, version.split(".")))
    trace = [
        entry((torch[0], torch[1]), action, address, size, 1_000_000 + 10 * number)
        for number, (action, address, size) in enumerate(ACTIONS)
        if action != "annotate" or torch >= (2, 14)
    ]
    failed = entry((torch[0], torch[1]), "oom", 0, 3 << 30, 1_000_200)
    del failed["addr"]
    block = {"address": BASE + 1024, "size": 512, "requested_size": 512, "state": "active_allocated", "frames": FRAMES}
    segment = {
        "device": 0,
        "address": BASE,
        "total_size": SEGMENT,
        "allocated_size": 512,
        "active_size": 512,
        "requested_size": 512,
        "stream": 0,
        "segment_type": "small",
        "segment_pool_id": (0, 0),
        "is_expandable": False,
        "frames": [],
        "blocks": [
            {**block, "address": BASE, "size": 1024, "requested_size": 0, "state": "inactive", "frames": []},
            block,
            {**block, "address": BASE + 1536, "size": SEGMENT - 1536, "requested_size": 0, "state": "inactive"},
        ],
    }
    if torch < (2, 2):
        segment["blocks"] = [without(part, "address") for part in segment["blocks"]]
    found = {
        "segments": [segment],
        "device_traces": [[*trace, {**failed, "device_free": 1 << 20}], []],
        "allocator_settings": {"expandable_segments": False, "max_split_size": -1, "roundup_power2_divisions": {}},
        "external_annotations": [],
    }
    if torch >= (2, 15):
        found |= {"host_segments": [], "host_traces": [dict(found["device_traces"][0][0])]}
    return found


def without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def parts(*pieces: bytes | Sequence[bytes]) -> bytes:
    return b"\x80\x04" + b"".join(piece if isinstance(piece, bytes) else b"".join(piece) for piece in pieces)
