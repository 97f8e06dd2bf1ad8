"""Plans one step so that the same bytes come out each time: what a case and an assertion in a test share."""

from __future__ import annotations

from memtrace.allocator.caching_allocator import CachingAllocator, replay
from memtrace.gate.result import CaseResult
from memtrace.planning.by_module import holdings
from memtrace.planning.simulated_run import Training, run_two_steps
from memtrace.simulation.kernels import Target


def planned(training: Training) -> CaseResult:
    """Returns the bytes of the second of two steps: the same ones whatever the process did before.

    Raises:
        PlanError: the model cannot be made, refuses the batch, or does what cannot be simulated.
    """
    run = run_two_steps(training)
    by_moment = holdings(run.timeline, run.marks, run.makers, run.owners)
    for moment, breakdown in run.moments.items():
        added = {key: sum(sizes.values()) for key, sizes in by_moment[moment].items()}
        assert added == dict(breakdown.entries), "modules add up to the breakdown"
    reserved = None
    if training.target is Target.CUDA:
        allocator = CachingAllocator()
        replay(run.events(), allocator)
        reserved = allocator.peak_reserved_bytes
    return CaseResult(
        modules={
            moment: {" ".join(filter(None, key)): sizes for key, sizes in held.items()}
            for moment, held in by_moment.items()
        },
        reserved_bytes=reserved,
        host_bytes=run.host_bytes,
    )
