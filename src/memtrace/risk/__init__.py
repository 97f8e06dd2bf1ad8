"""How near a run is to the end of its memory: `docs/risk.md` says what each figure means and how it is found."""

from __future__ import annotations

from memtrace.risk.advice import advise
from memtrace.risk.monitor import WARN_AT, RiskMonitor

__all__ = ["WARN_AT", "RiskMonitor", "advise"]
