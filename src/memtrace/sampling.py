"""When to trace a step."""

from __future__ import annotations


class TraceSchedule:
    """Traces the first step that begins with optimizer state, then every `trace_every` steps.

    An optimizer without state (plain SGD) has its first trace at the second step: the first one is never
    representative, because gradients and state are made in it.
    """

    def __init__(self, trace_every: int) -> None:
        self._trace_every = trace_every
        self._last: int | None = None
        self._on_demand = False

    def ask(self) -> None:
        """Makes the next step a traced one."""
        self._on_demand = True

    def wants(self, step: int, *, has_state: bool) -> bool:
        """Returns whether to trace the step with this number, from 1."""
        if self._on_demand or self._trace_every == 1:
            return True
        if self._last is None:
            return has_state or step >= 2
        return self._trace_every > 0 and step - self._last >= self._trace_every

    def traced(self, step: int) -> None:
        """Notes that this step was traced."""
        self._last, self._on_demand = step, False

    def missed(self, step: int) -> None:
        """Notes that this step was to be traced and could not be: the next one is due."""
        self._on_demand = True
