"""When to trace a step, and when to make a record of it: a budget of wall time, spent where the picture is new."""

from __future__ import annotations

from collections import deque
from math import ceil
from statistics import median, median_high

from memtrace.record.breakdown import StepRecord
from memtrace.record.categories import PERSISTENT, Moment

_NEIGHBOURS = 15
"""How many counted steps a traced one is compared with."""
_TRACES = 5
"""By how many of the last traces the cost of the next one is told."""
_MOST_LOST = 8
"""Windows that are lost in a row until tracing is given up."""
_MAX_GRID = 2**40
_ALL_RECORDED = 32
"""Steps at the beginning that have a record in any case: what a record takes is learned from them."""
_SEEN = 0.6
"""Share of the budget that is spent by memtrace's own clock. The rest is for what that clock does not see: how long it
takes to call a hook, and that training goes on with caches that memtrace has used."""
_RECORDS_SHARE = 0.5
"""Share of it that is for counting, where it is not enough for a record of every step: for what the steps take that are
skipped, and from the rest for records."""
_LONGEST_GAP_SECONDS = 1.0
"""Time without a record at most, as long as there are steps: a scrape sees nothing older."""
_MOVED = 0.01
"""By which share of the traced peak something must move to make the picture new."""


class TraceSchedule:
    """Decides which steps are traced, which are counted, and which are skipped without a record.

    The first trace is of the first step that begins with optimizer state (without any, as with plain SGD, of the second
    step: gradients and state are made in the first one, which is never representative). Then there are two ways:

    * `trace_every=N` traces every N steps; 0 never again.
    * `trace_every=None` keeps an account: a step earns three fifths of `overhead_budget` of the wall time since the one
      before, and pays what memtrace took of it. A traced step also pays what it took longer than the median of its
      neighbours. The next trace is due when the account covers one like the last; already when it is not overdrawn if
      the picture has changed (a larger batch than any traced, a new high-water mark, a persistent category that moved);
      and after `max_trace_interval` steps in any case.

    Ranks wait for each other in every step, so a trace of any rank makes a longer step of all: what all of them lose is
    one trace for each step in which any of them traces. So with several ranks the number of the step decides, and no
    rank has to ask another: a trace is due in multiples of the smallest power of two that is no shorter than the
    interval that the account pays for, where the account is not overdrawn. Ranks that see about the same step times
    come to the same number, and where they do not, one's steps are among the other's. A changed picture waits for such
    a step too. In place of `max_trace_interval` it is the largest power of two within it.

    A window that could not be opened costs nothing, and is tried again after 1, 2, 4, ... steps. One that was opened
    and lost is paid for like any trace, and tried again when the account covers one trace, then two, four, ...; with
    `trace_every=N` after N, 2 N, 4 N, ... steps. After eight in a row tracing is given up, until `ask()`.

    With `trace_every=None` the account spaces records too. A record of every step is made as long as that alone stays
    within the budget; from then on records are as far apart as half the budget pays for, less what skipped steps take,
    about a second at most, and the steps in between are skipped. A larger batch than any so far ends that at once.

    Args:
        trace_every: see above.
        overhead_budget: share of wall time.
        max_trace_interval: steps.
        ranks: processes that train together; None where nobody knows, which is taken as several. May be set later.
    """

    def __init__(
        self, *, trace_every: int | None, overhead_budget: float, max_trace_interval: int, ranks: int | None = None
    ) -> None:
        self.ranks = ranks
        self.untraceable = False
        """Whether steps go by in which nothing can be traced: then none is waited for."""
        self._trace_every = trace_every
        self._budget = _SEEN * overhead_budget
        self._max_interval = max_trace_interval
        self._on_demand = False
        self._last: StepRecord | None = None
        self._tried = 0
        """Number of the last step that was traced or whose window was lost."""
        self._lost = 0
        """Windows that were lost in a row."""
        self._refused = 0
        """Windows in a row that could not be opened."""
        self._not_before = 0
        self._largest_traced_tokens = 0
        self._changed = False
        self._credit_seconds = 0.0
        self._paid_seconds = 0.0
        """What traces have cost so far. What the account would hold without them tells what a step earns."""
        self._trace_costs: deque[float] = deque(maxlen=_TRACES)
        self._previous_end: float | None = None
        self._neighbours: deque[float] = deque(maxlen=_NEIGHBOURS)
        self._records = 0
        self._first_step = 0
        self._previous_step = 0
        self.largest_tokens = 0
        """Tokens of the largest micro batch of the recorded steps."""
        self._record_costs: deque[float] = deque(maxlen=_NEIGHBOURS)
        self._skip_costs: deque[float] = deque(maxlen=_NEIGHBOURS)
        self._intervals: deque[float] = deque(maxlen=_NEIGHBOURS)

    @property
    def given_up(self) -> bool:
        """Whether no step is traced any more because the windows of too many in a row were lost."""
        return self._lost >= _MOST_LOST

    def ask(self) -> None:
        """Makes the next step a traced one, also after tracing was given up."""
        self._on_demand = True
        self._lost = self._refused = self._not_before = 0

    def wants(self, step: int, *, has_state: bool, tokens: int) -> bool:
        """Returns whether to trace the step with this number, whose first micro batch has so many tokens."""
        if self.given_up or step < self._not_before:
            return False
        if self._on_demand or self._trace_every == 1:
            return True
        if not self._tried:
            return has_state or step >= 2
        if self._trace_every is not None:
            due = self._trace_every if self._last is not None else 1
            return 0 < due <= step - self._tried
        return self._affords(step, tokens) if self.ranks == 1 else self._meets(step)

    @property
    def keeps_being_refused(self) -> bool:
        """Whether many windows in a row could not be opened."""
        return self._refused >= _MOST_LOST

    def refused(self, step: int) -> None:
        """Notes that the window of this step, which was to be traced, could not be opened."""
        self._not_before = step + min(2**self._refused, self._max_interval)
        self._refused += 1

    def lost(self, step: int, seconds: float = 0.0) -> None:
        """Notes that the window of this step was opened and told nothing.

        Args:
            step: its number.
            seconds: what the window took, as far as no record will tell it.
        """
        self._lost += 1
        self._tried, self._refused = step, 0
        if self._trace_every is not None or self._on_demand:
            self._not_before = step + (self._trace_every or 1) * 2 ** (self._lost - 1)
        if self.given_up:
            self._on_demand = False
        self._pay(seconds)

    def steps_to_pass(self) -> int:
        """Returns how many steps to skip before the next record; mostly none."""
        waits = not self._tried and not self.untraceable and not self._refused  # for the first trace
        if self._trace_every is not None or self._on_demand or self._records < _ALL_RECORDED or waits:
            return 0
        cost, interval = median(self._record_costs), median(self._intervals)
        if cost <= self._budget * interval:
            return 0
        longest = _LONGEST_GAP_SECONDS / max(interval, 1e-9)
        if not self.given_up and not self.untraceable:
            longest = min(longest, self._next_line() - self._previous_step)
        earned = _RECORDS_SHARE * self._budget * interval - (median(self._skip_costs) if self._skip_costs else 0.0)
        apart = longest if earned * longest < cost else cost / earned
        return max(0, ceil(apart) - 1)

    def slowed(self, seconds: float) -> float:
        """Returns what a traced step took longer than the median of its neighbours; seconds.

        Args:
            seconds: what it took, without memtrace's own part.
        """
        return max(0.0, seconds - median(self._neighbours)) if self._neighbours else 0.0

    def ended(self, record: StepRecord, skipped_seconds: float = 0.0, *, lost: bool = False) -> None:
        """Notes a finished step, traced or not, with what it took.

        Args:
            record: the step. Its `self_seconds` are all that memtrace took since the record before.
            skipped_seconds: what of that the steps took that were skipped.
            lost: whether it was to be traced and its window told nothing.
        """
        seconds = record.step_seconds or 0.0
        began = record.unix_seconds - seconds if self._previous_end is None else self._previous_end
        self._previous_end = record.unix_seconds
        cost = record.self_seconds + record.slowed_seconds
        self._note_pace(record, record.unix_seconds - began, skipped_seconds)
        self._credit_seconds += self._budget * max(0.0, record.unix_seconds - began)
        if record.traced:
            self._last, self._tried, self._on_demand, self._changed = record, record.step, False, False
            self._lost = self._refused = self._not_before = 0
            if record.batch is not None and record.traced_from_micro_batch is None:
                self._largest_traced_tokens = max(self._largest_traced_tokens, record.batch.largest_micro_batch_tokens)
            self._pay(cost)
        elif lost:
            self.lost(record.step, cost)
        else:
            self._neighbours.append(seconds)
            self._record_costs.append(max(0.0, record.self_seconds - skipped_seconds))
            self._changed = self._changed or (self._last is not None and picture_changed(record, self._last))
            self._credit_seconds -= cost

    def _affords(self, step: int, tokens: int) -> bool:
        """Returns whether one rank alone traces this step."""
        if step - self._tried >= self._max_interval:
            return True
        changed = self._changed or self._last is None or tokens > self._largest_traced_tokens
        traces = 2 ** (self._lost - 1) if self._lost > 1 else not changed
        return self._credit_seconds >= traces * self._trace_seconds()

    def _meets(self, step: int) -> bool:
        """Returns whether this is a step in which several ranks trace, this one among them."""
        if self._crosses(step, _power_within(self._max_interval)):
            return True
        return self._credit_seconds >= 0.0 and self._crosses(step, self._grid())

    def _pay(self, seconds: float) -> None:
        """Pays for a window."""
        if seconds:
            self._trace_costs.append(seconds)
        self._credit_seconds -= seconds
        self._paid_seconds += seconds

    def _trace_seconds(self) -> float:
        """Returns what the next trace will cost: the last one, or with several ranks a median, which they agree on."""
        if not self._trace_costs:
            return 0.0
        return self._trace_costs[-1] if self.ranks == 1 else median_high(self._trace_costs)

    def _grid(self) -> int:
        """Returns the power of two in whose multiples several ranks trace; 0 where the account never pays for it."""
        steps = max(1, self._previous_step - self._first_step)
        earned = (self._credit_seconds + self._paid_seconds) / steps
        if earned <= 0.0:
            return 0
        interval = self._trace_seconds() / earned * 2 ** max(0, self._lost - 1)
        return 0 if interval > _MAX_GRID else 1 << max(0, ceil(interval) - 1).bit_length()

    def _crosses(self, step: int, grid: int) -> bool:
        """Returns whether this is a multiple of the grid, or the first step with a record after one.

        Loops number their steps as they like.
        """
        return grid > 0 and step // grid > self._previous_step // grid

    def _next_line(self) -> int:
        """Returns the number of a step that must not be skipped, because it may be traced."""
        if self.ranks == 1:
            return max(self._tried + self._max_interval, self._not_before, self._previous_step + 1)
        longest = _power_within(self._max_interval)
        grid = min(self._grid() or longest, longest)
        return (self._previous_step // grid + 1) * grid

    def _note_pace(self, record: StepRecord, wall_seconds: float, skipped_seconds: float) -> None:
        if not self._records:
            self._first_step = self._previous_step = record.step - 1
        steps, self._previous_step = record.step - self._previous_step, record.step
        self._records += 1
        if record.batch is not None:
            self.largest_tokens = max(self.largest_tokens, record.batch.largest_micro_batch_tokens)
        self._intervals.append(max(0.0, wall_seconds) / max(1, steps))
        if steps > 1:
            self._skip_costs.append(skipped_seconds / (steps - 1))


def _power_within(steps: int) -> int:
    """Returns the largest power of two that is not above a number of steps."""
    return 1 << (steps.bit_length() - 1)


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
    now_held, then_held = left.by_category(), right.by_category()
    return any(abs(now_held.get(category, 0) - then_held.get(category, 0)) > allowance for category in PERSISTENT)
