"""What another allocator setting would have reserved: the end of a report, where a traced step was recorded."""

from __future__ import annotations

from memtrace.allocator.recording import AllocatorRecording
from memtrace.allocator.settings import parse_settings
from memtrace.allocator.what_if import candidates, what_if
from memtrace.errors import ConfigError
from memtrace.record.oom.report import AllocatorAnswer, FailedRequest, SettingOutcome
from memtrace.sources.cuda.settings_variable import variable_for

MAX_EVENTS = 400_000
"""Events of a recording that is replayed in a process that has just failed."""
MAX_REPLAYED = 1_000_000
"""Events of all replays together, about 2 seconds of processor time: fewer settings are tried of a long step."""
_LEAST = 2
"""Settings that are compared whatever it takes: the one in force, and expandable segments."""


def answer(
    recording: AllocatorRecording, request: FailedRequest, device_free_bytes: int | None
) -> AllocatorAnswer | None:
    """Returns what settings would have reserved in a recorded step; None where the recording is too long.

    Stays in this process and is bounded in time and memory: see `MAX_EVENTS` and `MAX_REPLAYED`.

    Args:
        recording: of a traced step.
        request: what failed.
        device_free_bytes: what the device had free when it was last read, for a request that came without it.
    """
    events = len(recording.events)
    if not 0 < events <= MAX_EVENTS:
        return None
    try:
        tried = candidates(parse_settings(recording.settings), collects=recording.limit_bytes is not None)
    except ConfigError:  # another allocator, or a setting of a later torch
        return None
    tried.sort(key=lambda setting: setting.text != "expandable_segments:True")
    found = what_if(recording, others=tried[: max(_LEAST, MAX_REPLAYED // events) - 1], workers=1)
    if found.in_force.stopped_at is not None:  # the model is wrong for this step: it was served
        return None
    requested = request.bound_bytes
    free = device_free_bytes if request.free_bytes is None else request.free_bytes
    shortfall = None if requested is None or free is None else max(requested - free, 0)
    return AllocatorAnswer(
        origin=recording.origin,
        variable=variable_for(recording.torch),
        outcomes=tuple(
            SettingOutcome(
                settings=outcome.settings.text,
                in_force=outcome.in_force,
                reserved_bytes=outcome.reserved_bytes,
                saved_bytes=found.saved_bytes(outcome),
                retries=outcome.retries,
                would_fit=None if shortfall is None else found.saved_bytes(outcome) >= shortfall,
            )
            for outcome in found.ranked
            if outcome.stopped_at is None
        ),
    )
