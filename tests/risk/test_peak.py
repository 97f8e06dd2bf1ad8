"""What the peaks of steps teach."""

from risk_steps import batch, breakdown, traced

from memtrace.record.categories import Category, Moment, Phase
from memtrace.record.risk_reading import LargestBatch, PeakForecast, ShapeSource
from memtrace.risk.peak import MAX_POINTS, PeakModel


def target(tokens: int, positions: int | None = None) -> LargestBatch:
    return LargestBatch(tokens=tokens, positions=positions, source=ShapeSource.SETTING)


def forecast(model: PeakModel, tokens: int, base: int = 100) -> PeakForecast:
    forecast = model.forecast(target(tokens), base=base)
    assert forecast is not None
    return forecast


def learned(*positions: int) -> PeakModel:
    model = PeakModel()
    for step, length in enumerate(positions):
        record = traced(step, positions=length)
        assert record.batch is not None
        model.learn_traced(record.moments[Moment.PEAK], record.batch)
    return model


def test_nothing_learned_foresees_nothing() -> None:
    """Before the first step with a known peak there is no forecast."""
    assert PeakModel().forecast(target(100), base=1) is None


def test_forecast_stands_on_the_base_of_now() -> None:
    """What grew since the steps that were learned from, such as a leak, is in the forecast."""
    model = learned(10, 20, 30, 40, 50, 60)
    assert forecast(model, 200).predicted_bytes == 100 + 800
    assert forecast(model, 200, base=150).predicted_bytes == 150 + 800


def test_gradients_are_not_part_of_the_base() -> None:
    """Gradients that wait at the end of the step are not counted on top of the peak that has them or not."""
    model = PeakModel()
    sizes = {Category.WEIGHTS: 100, Category.GRADIENTS: 50, Category.ACTIVATIONS: 40}
    model.learn_traced(breakdown(Moment.PEAK, sizes), batch(1, 10))
    assert forecast(model, 10).predicted_bytes == 100 + 90


def test_peak_inside_the_optimizer_is_a_floor() -> None:
    """Temporaries of the optimizer say nothing about larger batches, and smaller ones do not get below them."""
    model = learned(10, 20, 30, 40, 50, 60)
    sizes = {Category.WEIGHTS: 100, Category.TEMPORARIES: 300}
    model.learn_traced(breakdown(Moment.PEAK, sizes, phase=Phase.OPTIMIZER), batch(2, 5))
    assert forecast(model, 10).predicted_bytes == 100 + 300
    assert forecast(model, 200).predicted_bytes == 100 + 800


def test_forecast_is_not_below_a_smaller_batch_that_was_seen() -> None:
    """What a smaller batch took, a larger one takes at least, whatever the line says."""
    model = learned(10, 20, 30, 40, 50, 60)
    model.learn(1000, batch(2, 61))
    assert forecast(model, 124).predicted_bytes >= 1100


def test_category_is_what_the_batch_spends_most_on() -> None:
    """The forecast names the largest category that follows the batch."""
    model = PeakModel()
    sizes = {Category.WEIGHTS: 1000, Category.ACTIVATIONS: 10, Category.TEMPORARIES: 30}
    model.learn_traced(breakdown(Moment.PEAK, sizes), batch(1, 10))
    assert forecast(model, 10).category is Category.TEMPORARIES


def test_shapes_are_bounded_and_the_largest_stay() -> None:
    """However many shapes a run has, as many are kept as the limit says."""
    model = learned(*range(1, MAX_POINTS + 50))
    assert forecast(model, 300).points == MAX_POINTS
    assert model.longest == (2 * (MAX_POINTS + 49), MAX_POINTS + 49)
