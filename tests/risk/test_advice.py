"""The warning in words."""

from memtrace.record.categories import Category
from memtrace.record.risk_reading import GrowthForecast, LargestBatch, PeakForecast, RiskReading, ShapeSource
from memtrace.risk import advise

GIB = 2**30


def peak(gib: int, category: Category = Category.ACTIVATIONS) -> PeakForecast:
    batch = LargestBatch(tokens=8192, positions=4096, source=ShapeSource.DATASET)
    return PeakForecast(
        predicted_bytes=gib * GIB, band_bytes=GIB, batch=batch, points=9, quadratic=False, category=category
    )


def growth() -> GrowthForecast:
    return GrowthForecast(
        category=Category.UNATTRIBUTED, bytes_per_step=2.0**20, steps_to_limit=4000, seconds_to_limit=2400.0
    )


def test_a_batch_that_will_not_fit_is_told_with_what_to_do() -> None:
    """The text has the batch and who says so, the bytes, the category and a remedy."""
    text = advise(RiskReading(step=5, capacity_bytes=80 * GIB, peak=peak(84)))
    assert text is not None
    for word in ("8192 tokens", "dataset", "84.00 GiB", "80.00 GiB", "activations", "gradient checkpointing"):
        assert word in text


def test_a_leak_is_told_with_its_deadline() -> None:
    """The text has the category, the rate, the steps and the minutes."""
    text = advise(RiskReading(step=5, capacity_bytes=80 * GIB, peak=peak(40), growth=growth()))
    assert text is not None
    for word in ("unattributed", "1.00 MiB a step", "4000 steps", "40 min", "kept over steps"):
        assert word in text


def test_the_batch_comes_before_the_leak() -> None:
    """Where the largest batch does not fit in any case, that is what is told."""
    text = advise(RiskReading(step=5, capacity_bytes=80 * GIB, peak=peak(84), growth=growth()))
    assert text is not None
    assert "longest batch" in text


def test_every_category_has_something_to_do() -> None:
    """No warning ends without a remedy."""
    for category in Category:
        text = advise(RiskReading(step=5, capacity_bytes=GIB, peak=peak(2, category)))
        assert text is not None
        assert len(text.rsplit("; ", 1)[1]) > 20


def test_nothing_known_says_nothing() -> None:
    """Without a limit there is nothing to warn of."""
    assert advise(RiskReading(step=5, peak=peak(84))) is None
