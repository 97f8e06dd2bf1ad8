"""Where a step ends whose end the loop does not tell: when the optimizers that it waits for have stepped."""

from __future__ import annotations

import torch

from memtrace.attribution.scan import Scan

_IDLE = 16
"""Steps of one optimizer after which another one that has not stepped is idle."""


class Cycle:
    """Counts the steps of the optimizers, and says where a step of the training is over.

    A step is over when every optimizer has stepped, as often as its engine calls it. It does not wait for an idle one,
    which has not stepped while another has stepped 16 times: it was replaced, is not used yet, or its turn is rarer.
    What an idle optimizer does belongs to the step that it falls into; once it steps again within 16 steps, it is
    waited for.

    So five steps of a critic and one of its generator are one step, and so are one of each in turns. Where only one of
    them is trained, the first 16 of its steps are one, and then each is one.

    Args:
        scan: knows the optimizers that are still there.
    """

    def __init__(self, scan: Scan) -> None:
        self._scan = scan
        self._steps: dict[int, int] = {}
        """Steps of each optimizer in this cycle, by its identity."""
        self._awaited: dict[int, int] | None = None
        """Steps that are still to come of each optimizer that is waited for; None before the first one of a cycle."""
        self._idle: dict[int, int] = {}
        """Cycles that have ended since an idle optimizer has last stepped."""

    def stepped(self, optimizer: torch.optim.Optimizer) -> bool:
        """Notes a step of an optimizer; returns whether a step of the training is over with it."""
        key, updates = id(optimizer), self._scan.updates(optimizer)
        self._steps[key] = self._steps.get(key, 0) + 1
        if self._awaited is None:
            self._awaited = {key: count for key, count in self._updates().items() if key not in self._idle}
        if key in self._idle and self._idle.pop(key) >= _IDLE:
            self._idle[key] = 0
        if key in self._awaited:
            self._awaited[key] -= 1
            if not self._awaited[key]:
                del self._awaited[key]
        if self._awaited and self._steps[key] > updates:  # once more, while another one has not: is it still there?
            self._awaited = {key: self._awaited[key] for key in self._updates() if key in self._awaited}
        if self._awaited:
            if self._steps[key] < _IDLE * updates:
                return False
            self._idle.pop(key, None)
            self._idle |= {key: _IDLE for key in self._awaited if key not in self._steps}
        self._over()
        return True

    def ends(self) -> None:
        """Notes that a step of the training is over, whoever has not stepped."""
        if self._steps:
            self._over()

    def _over(self) -> None:
        for key in self._idle:
            if key not in self._steps:
                self._idle[key] += 1
        self._steps.clear()
        self._awaited = None

    def _updates(self) -> dict[int, int]:
        return {id(optimizer): self._scan.updates(optimizer) for optimizer in self._scan.optimizers}
