"""How near a run is to the end of its memory: `docs/risk.md` says what each figure means and how it is found.

In come records, one a step. Out go a forecast of the peak, of growth, and the risk. Must not know torch or files.
Another feature of a batch that the peak depends on goes into `shapes`, another sign of growth into `growth`.
"""

from __future__ import annotations

from memtrace.risk.advice import advise
from memtrace.risk.monitor import WARN_AT, RiskMonitor

__all__ = ["WARN_AT", "RiskMonitor", "advise"]
