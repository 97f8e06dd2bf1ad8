"""Finding an entry of a table by the name that a user wrote."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

from memtrace.errors import PlanError

_Item = TypeVar("_Item")


def by_name(kind: str, name: str, table: Mapping[str, _Item]) -> _Item:
    """Returns the entry of a table with this name, in whatever case it is written.

    Raises:
        PlanError: there is none; the message proposes the nearest name, else all of them.
    """
    folded = {known.casefold(): known for known in table}
    known = folded.get(name.casefold())
    if known is None:
        near = difflib.get_close_matches(name.casefold(), folded, n=1)
        hint = f"did you mean {folded[near[0]]!r}?" if near else f"expected one of {', '.join(table)}"
        raise PlanError(f"unknown {kind} {name!r}: {hint}")
    return table[known]
