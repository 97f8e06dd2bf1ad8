"""The trend of persistent memory."""

from collections.abc import Callable

import pytest

from memtrace.record.categories import Category
from memtrace.risk.growth import MIN_STEPS, Growth, GrowthTrend, Level


def growth(level: Callable[[int], int], steps: int = 64) -> Growth | None:
    trend = GrowthTrend()
    for step in range(steps):
        sizes = {Category.WEIGHTS: 10_000, Category.UNATTRIBUTED: level(step)}
        trend.add(Level(step=step, unix_seconds=100.0 + 3 * step, by_category=sizes))
    return trend.growth()


def test_leak_in_every_step_is_found() -> None:
    """A list that keeps a tensor of each step grows by that tensor a step."""
    found = growth(lambda step: 70 * step)
    assert found is not None
    assert found.category is Category.UNATTRIBUTED
    assert found.bytes_per_step == 70
    assert found.seconds_per_step == 3


def test_leak_in_every_tenth_step_is_found() -> None:
    """Growth in stairs has the slope of the stairs."""
    found = growth(lambda step: 1000 * (step // 10))
    assert found is not None
    assert found.bytes_per_step == pytest.approx(100, rel=0.2)


@pytest.mark.parametrize(
    "level",
    [
        pytest.param(lambda step: 500, id="flat"),
        pytest.param(lambda step: 500 * (step % 2), id="up and down"),
        pytest.param(lambda step: step % 16 * 100, id="sawtooth"),
        pytest.param(lambda step: 5000 if step > 30 else 0, id="one jump"),
        pytest.param(lambda step: min(step, 20) * 100, id="a cache that is full"),
        pytest.param(lambda step: round(10_000 * (1 - 0.9**step)), id="a cache that fills"),
        pytest.param(lambda step: 10_000 - 100 * step, id="shrinking"),
        pytest.param(lambda step: step // 8, id="a few bytes"),
    ],
)
def test_what_is_no_leak_is_not_found(level: Callable[[int], int]) -> None:
    """Memory that stays, comes and goes, or grows for a while is not reported."""
    assert growth(level) is None


def test_a_trend_needs_some_steps() -> None:
    """Growth over fewer steps than the minimum is no trend yet."""
    assert growth(lambda step: 70 * step, steps=MIN_STEPS - 1) is None
    assert growth(lambda step: 70 * step, steps=MIN_STEPS) is not None


def test_steps_that_are_counted_anew_begin_a_new_trend() -> None:
    """A run that starts again from step 1 in the same process is no trend with what was before."""
    trend = GrowthTrend()
    for step in (*range(1, 30), *range(1, MIN_STEPS)):
        trend.add(Level(step=step, unix_seconds=float(step), by_category={Category.UNATTRIBUTED: 100 * step}))
    assert trend.growth() is None
