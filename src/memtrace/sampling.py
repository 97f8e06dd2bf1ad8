"""When to trace a step, and when to make a record of it: a budget of wall time, spent where the picture is new."""

from __future__ import annotations

from collections import deque
from math import ceil
from statistics import median

from memtrace.breakdown import StepRecord
from memtrace.categories import PERSISTENT, Moment

_NEIGHBOURS = 15
"""How many counted steps a traced one is compared with."""
_ALL_RECORDED = 32
"""Steps at the beginning that have a record in any case: what a record takes is learned from them."""
_SEEN = 0.6
"""Share of the budget that is spent by memtrace's own clock. The rest is for what that clock does not see: how long it
takes to call a hook, and that training goes on with caches that memtrace has used."""
_RECORDS_SHARE = 0.5
"""Share of it that is for counting, where it is not enough for a record of every step: for what the steps take that are
passed over, and from the rest for records."""
_LONGEST_GAP_SECONDS = 1.0
"""Time without a record at most, as long as there are steps: a scrape sees nothing older."""
_MOVED = 0.01
"""By which share of the traced peak something must move to make the picture new."""


class TraceSchedule:
    """Decides which steps are traced, which are counted, and which are passed over without a record.

    The first trace is of the first step that begins with optimizer state (without any, as with plain SGD, of the second
    step: gradients and state are made in the first one, which is never representative). Then there are two ways:

    * `trace_every=N` traces every N steps; 0 never again.
    * `trace_every=None` keeps an account: a step earns three fifths of `overhead_budget` of the wall time since the one
      before, and pays what memtrace took of it. A traced step also pays what it took longer than the median of its
      neighbours. The next trace is due when the account covers one like the last; already when it is not overdrawn if
      the picture has changed (a larger batch than any traced, a new high-water mark, a persistent category that moved);
      and after `max_trace_interval` steps in any case.

    With `trace_every=None` the account spaces records too. A record of every step is made as long as that alone stays
    within the budget; from then on records are as far apart as half the budget pays for, less what passing over takes,
    about a second at most, and the steps in between are passed over. A larger batch than any so far ends that at once.
    """

    def __init__(self, *, trace_every: int | None, overhead_budget: float, max_trace_interval: int) -> None:
        self._trace_every = trace_every
        self._budget = _SEEN * overhead_budget
        self._max_interval = max_trace_interval
        self._on_demand = False
        self._last: StepRecord | None = None
        self._largest_traced_tokens = 0
        self._changed = False
        self._credit_seconds = 0.0
        self._trace_seconds = 0.0
        self._previous_end: float | None = None
        self._neighbours: deque[float] = deque(maxlen=_NEIGHBOURS)
        self._records = 0
        self._previous_step = 0
        self.largest_tokens = 0
        """Tokens of the largest micro batch of the recorded steps."""
        self._record_costs: deque[float] = deque(maxlen=_NEIGHBOURS)
        self._pass_costs: deque[float] = deque(maxlen=_NEIGHBOURS)
        self._intervals: deque[float] = deque(maxlen=_NEIGHBOURS)

    def ask(self) -> None:
        """Makes the next step a traced one."""
        self._on_demand = True

    def wants(self, step: int, *, has_state: bool, tokens: int) -> bool:
        """Returns whether to trace the step with this number, whose first micro batch has so many tokens."""
        if self._on_demand or self._trace_every == 1:
            return True
        if self._last is None:
            return has_state or step >= 2
        since = step - self._last.step
        if self._trace_every is not None:
            return 0 < self._trace_every <= since
        if since >= self._max_interval:
            return True
        changed = self._changed or tokens > self._largest_traced_tokens
        return self._credit_seconds >= (0.0 if changed else self._trace_seconds)

    def missed(self) -> None:
        """Notes that a step was to be traced and could not be: the next one is due."""
        self._on_demand = True

    def steps_to_pass(self) -> int:
        """Returns how many steps to pass over before the next record; mostly none."""
        if self._trace_every is not None or self._on_demand or self._records < _ALL_RECORDED or self._last is None:
            return 0
        cost, interval = median(self._record_costs), median(self._intervals)
        if cost <= self._budget * interval:
            return 0
        longest = min(
            _LONGEST_GAP_SECONDS / max(interval, 1e-9), self._last.step + self._max_interval - self._previous_step
        )
        earned = _RECORDS_SHARE * self._budget * interval - (median(self._pass_costs) if self._pass_costs else 0.0)
        apart = longest if earned * longest < cost else cost / earned
        return max(0, ceil(apart) - 1)

    def slowed(self, seconds: float) -> float:
        """Returns what a traced step took longer than the median of its neighbours; seconds.

        Args:
            seconds: what it took, without memtrace's own part.
        """
        return max(0.0, seconds - median(self._neighbours)) if self._neighbours else 0.0

    def ended(self, record: StepRecord, passed_seconds: float = 0.0) -> None:
        """Notes a finished step, traced or not, with what it took.

        Args:
            record: the step. Its `self_seconds` are all that memtrace took since the record before.
            passed_seconds: what of that the steps took that were passed over.
        """
        seconds = record.step_seconds or 0.0
        began = record.unix_seconds - seconds if self._previous_end is None else self._previous_end
        self._previous_end = record.unix_seconds
        cost = record.self_seconds + record.slowed_seconds
        self._note_pace(record, record.unix_seconds - began, passed_seconds)
        if record.traced:
            self._trace_seconds = cost
            self._last, self._on_demand, self._changed = record, False, False
            if record.batch is not None:
                self._largest_traced_tokens = max(self._largest_traced_tokens, record.batch.largest_micro_batch_tokens)
        else:
            self._neighbours.append(seconds)
            self._changed = self._changed or (self._last is not None and picture_changed(record, self._last))
        self._credit_seconds += self._budget * max(0.0, record.unix_seconds - began) - cost

    def _note_pace(self, record: StepRecord, wall_seconds: float, passed_seconds: float) -> None:
        steps, self._previous_step = record.step - self._previous_step, record.step
        self._records += 1
        if record.batch is not None:
            self.largest_tokens = max(self.largest_tokens, record.batch.largest_micro_batch_tokens)
        self._intervals.append(max(0.0, wall_seconds) / max(1, steps))
        if steps > 1:
            self._pass_costs.append(passed_seconds / (steps - 1))
        if not record.traced:
            self._record_costs.append(max(0.0, record.self_seconds - passed_seconds))


def picture_changed(record: StepRecord, traced: StepRecord) -> bool:
    """Returns whether a step differs so much from the last traced one that the trace no longer shows it.

    It does when the allocator has a new high-water mark, or a persistent category at the end of the step has moved, by
    more than a hundredth of the traced peak.
    """
    peak = traced.moments.get(Moment.PEAK)
    allowance = _MOVED * (peak.total_bytes if peak is not None else 0)
    if record.allocator is not None and traced.allocator is not None:
        now, then = record.allocator.peak_allocated_bytes, traced.allocator.peak_allocated_bytes
        if now is not None and then is not None and now > then + allowance:
            return True
    left, right = record.moments.get(Moment.STEP_END), traced.moments.get(Moment.STEP_END)
    if left is None or right is None:
        return False
    return any(abs(left[category] - right[category]) > allowance for category in PERSISTENT)
