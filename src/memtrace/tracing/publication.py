"""What a tracer publishes: records, the snapshot for exporters, the warning of a run that runs out of memory."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from memtrace.record.breakdown import Breakdown, History, StepRecord
from memtrace.record.categories import Moment
from memtrace.record.limitations import Limitation, Unseen
from memtrace.record.risk_reading import LargestBatch
from memtrace.record.snapshot import RunIdentity, Snapshot, headroom_bytes
from memtrace.risk import WARN_AT, RiskMonitor, advise
from memtrace.sources.devices.sampler import DeviceSampler

logger = logging.getLogger("memtrace")

Listener = Callable[[StepRecord], None]


class Publication:
    """The newest state of one tracer, and those who are notified of it.

    The snapshot is replaced as a whole, so that it can be read from any thread; everything else belongs to the
    training thread.

    Args:
        identity: which process of which run this is, as far as it is known before the tracer is attached.
        history: how many records are kept.
        largest: the largest micro batch that the run can still meet; None where nobody knows.
        plan: the plan that the run was given, by moment.
        skipped: returns how many steps have been skipped without a record. They are added when somebody looks,
            which is not in every step.
    """

    def __init__(
        self,
        *,
        identity: RunIdentity,
        history: int,
        largest: LargestBatch | None,
        plan: Mapping[Moment, Breakdown],
        skipped: Callable[[], int],
    ) -> None:
        self._snapshot = Snapshot(identity=identity, up=False, plan=plan)
        self._history: deque[StepRecord] = deque(maxlen=history)
        self._listeners: list[Listener] = []
        self._risk = RiskMonitor(largest)
        self._warned = False
        self._said: set[Unseen] = set()
        """What the log has been told of things that are not seen."""
        self._skipped = skipped

    @property
    def snapshot(self) -> Snapshot:
        """The state after the last step; its device reading is the one of that step."""
        found, skipped = self._snapshot, self._skipped()
        return (
            found
            if skipped == found.totals.skipped_steps
            else replace(found, totals=found.totals.with_skipped(skipped))
        )

    @property
    def steps(self) -> int:
        """Steps so far, those without a record included."""
        totals = self._snapshot.totals
        return totals.steps + self._skipped() - totals.skipped_steps

    def snapshot_with(self, sampler: DeviceSampler | None) -> Snapshot:
        """Returns the state with the newest reading of the device; may be called from any thread."""
        if sampler is None:
            return self.snapshot
        try:
            return replace(self.snapshot, device_memory=sampler.reading())
        except RuntimeError:  # a fault of the sampling thread: the end of the next step raises it under the guard
            return replace(self.snapshot, up=False)

    @property
    def history(self) -> History:
        """The records of the recent steps, oldest first."""
        return History(self._history)

    @property
    def latest(self) -> StepRecord | None:
        """The record of the last finished step; None before the first one."""
        return self._history[-1] if self._history else None

    def begin(self, identity: RunIdentity, limit_bytes: int | None) -> None:
        """Notes that the tracer is at work, for whom, and what the run may use of the device."""
        begun = self._snapshot.begun_unix_seconds or time.time()
        self._snapshot = replace(
            self._snapshot, identity=identity, up=True, limit_bytes=limit_bytes, begun_unix_seconds=begun
        )

    def switch_off(self) -> None:
        """Notes that a fault has ended the tracer's work."""
        self._snapshot = replace(self._snapshot, up=False)

    def add_listener(self, listener: Listener) -> None:
        """Calls `listener(record)` after each step."""
        self._listeners.append(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Stops calling `listener`; one that is not called is left alone."""
        self._listeners = [known for known in self._listeners if known != listener]

    def expect(self, batch: LargestBatch) -> None:
        """Tells how large a micro batch the run can still meet."""
        self._risk.expect(batch)

    def publish(self, record: StepRecord) -> None:
        """Takes in a finished step, forecasts, warns once in the log of the run when the risk is high, and tells."""
        self._history.append(record)
        before = self._snapshot
        headroom = headroom_bytes(before.identity.device, before.limit_bytes, record.device_memory, record.allocator)
        risk = self._risk.observe(record, headroom_bytes=headroom)
        self._snapshot = replace(
            before,
            totals=before.totals.after(record),
            latest=record,
            latest_traced=record if record.traced else before.latest_traced,
            risk=risk,
        )
        if not self._warned and risk.oom_risk_ratio is not None and risk.oom_risk_ratio >= WARN_AT:
            self._warned = True
            logger.warning("memtrace: rank %d, step %d: %s", record.rank, record.step, advise(risk))
        for listener in self._listeners:
            listener(record)

    def limit(self, limitation: Limitation) -> None:
        """Takes in something that is not seen: said once in the log, and shown from then on."""
        if limitation.unseen in self._snapshot.not_seen:
            return
        self._snapshot = replace(self._snapshot, not_seen=(*self._snapshot.not_seen, limitation.unseen))
        if limitation.unseen not in self._said:
            self._said.add(limitation.unseen)
            logger.warning("memtrace: rank %d: %s", self._snapshot.identity.rank, limitation.text)

    def sees(self, seen: Unseen) -> None:
        """Takes back that something is not seen; what was said in the log is not said again."""
        if seen in self._snapshot.not_seen:
            still = tuple(unseen for unseen in self._snapshot.not_seen if unseen is not seen)
            self._snapshot = replace(self._snapshot, not_seen=still)

    def count_oom(self) -> None:
        """Counts a failed allocation."""
        self._snapshot = replace(self._snapshot, totals=self._snapshot.totals.after_oom())
