"""Documents in which something is wrong, for hypothesis."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def holders(value: Any) -> list[Any]:
    """Returns the value and everything inside it that holds something."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(holder for item in inside for holder in holders(item))] if value and inside else []


@st.composite
def spoilt(draw: st.DrawFn, documents: st.SearchStrategy[Any]) -> Any:
    """Draws a document in which one value, anywhere, is another one or is gone; it must hold something."""
    found = deepcopy(draw(documents))
    holder = draw(st.sampled_from(holders(found)))
    place = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
    if draw(st.booleans()):
        del holder[place]
    else:
        holder[place] = draw(json_values)
    return found
