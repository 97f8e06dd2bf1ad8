"""The pictures of a report, as plotly figures. No text from a log is in them: plotly reads some of it as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from plotly import graph_objects as go

from memtrace.exporters.run_directory.run_history import Observed, RankHistory, RunHistory
from memtrace.record.breakdown import Breakdown, StepCurve
from memtrace.record.categories import COLOURS, Category, Moment
from memtrace.record.risk_reading import ShapeSource
from memtrace.record.units import GIB, MIB

CAPACITY_COLOUR, FORECAST_COLOUR, PEAK_COLOUR = "#444c56", "#c98a1b", "#1f60c4"
FAR_ABOVE = 4
"""A line that lies this many times above the highest peak is left out."""
NEAR = 0.03
"""Moments of a step that are less than this share of it apart have one line and one label."""
_MOMENT_NAMES = {
    Moment.FORWARD_END: "end of forward",
    Moment.BACKWARD_END: "end of backward",
    Moment.STEP_END: "end of step",
    Moment.PEAK: "peak",
}


class Axis:
    """The unit of a picture: GiB where the run takes any, else MiB."""

    def __init__(self, largest: int) -> None:
        self.unit, self._factor = ("GiB", GIB) if largest >= GIB else ("MiB", MIB)

    def __call__(self, nbytes: float | None) -> float | None:
        """Returns bytes in the unit."""
        return None if nbytes is None else nbytes / self._factor


def figures(run: RunHistory) -> Iterator[tuple[str, str, go.Figure]]:
    """Yields title, explanation and picture, for each that the run has data for: of steps at least two make a line."""
    rank = run.fullest
    axis = Axis(max(rank.highest_peak, *(history.highest_peak for history in run.ranks)))
    peaks = rank.with_peak
    if len(peaks) > 1:
        yield (
            "What the peak is made of",
            f"Rank {rank.rank}, the fullest, at the moment of each step at which most is allocated.",
            _composition(peaks, Moment.PEAK, axis, capacity=True),
        )
        yield "Forecast", _whose_forecast(peaks[-1]), _forecast(peaks, axis)
    if any(step.record.batch is not None for step in peaks):
        yield "Peak against tokens", "Each point is a step; the cross is what is forecast.", _tokens(peaks, axis)
    if rank.timeline is not None:
        yield (
            f"Timeline of step {rank.timeline.step}",
            f"The step of rank {rank.rank} with the highest traced peak, from its begin to its end.",
            _timeline(rank.timeline.curve),
        )
    if peaks:
        yield (
            f"Step {peaks[-1].record.step}, moment by moment",
            "What is allocated at each moment of the last step whose peak is known.",
            _moments(peaks[-1], axis),
        )
    if sum(Moment.STEP_END in step.record.moments for step in rank.steps) > 1:
        yield (
            "Persistent memory",
            f"Rank {rank.rank} at the end of each step. A steady rise is a leak.",
            _composition(rank.steps, Moment.STEP_END, axis, capacity=False),
        )
    if sum(step.record.allocator is not None for step in rank.steps) > 1:
        yield (
            "Allocator",
            "What torch holds of the device, and what of it is in use at the end of a step.",
            _allocator(rank, axis),
        )
    if len(run.ranks) > 1:
        yield "Ranks", "The highest peak of each rank.", _ranks(run.ranks, axis)


def _figure(axis: Axis, x_title: str, traces: Sequence[go.Scatter | go.Bar], **layout: object) -> go.Figure:
    figure = go.Figure(data=list(traces))
    figure.update_layout(
        template="plotly_white",
        height=380,
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
        legend={"traceorder": "reversed" if layout.get("barmode") == "stack" else "normal"},
        hovermode="x unified",
        **layout,
    )
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=axis.unit, rangemode="tozero")
    return figure


def _composition(steps: Sequence[Observed], moment: Moment, axis: Axis, *, capacity: bool) -> go.Figure:
    found = [(step, step.record.moments.get(moment)) for step in steps]
    known = [(step, breakdown) for step, breakdown in found if breakdown is not None]
    numbers = [step.record.step for step, _ in known]
    traces = [
        go.Scatter(
            x=numbers,
            y=[axis(breakdown[category]) for _, breakdown in known],
            name=category.value,
            stackgroup="bytes",
            mode="lines",
            line={"width": 0.5, "color": COLOURS[category]},
            fillcolor=COLOURS[category],
        )
        for category in _present(breakdown for _, breakdown in known)
    ]
    if capacity:
        traces += _line("capacity", [step for step, _ in known], lambda step: step.risk.capacity_bytes, axis)
    return _figure(axis, "step", traces)


def _line(
    name: str, steps: Sequence[Observed], value: Callable[[Observed], int | None], axis: Axis
) -> list[go.Scatter]:
    """Returns a dashed line; none where no step knows the value, or where it would flatten all the others."""
    known = [size for step in steps if (size := value(step)) is not None]
    if not known or min(known) > FAR_ABOVE * max(step.peak_bytes or 0 for step in steps):
        return []
    values = [axis(value(step)) for step in steps]
    style = {"color": CAPACITY_COLOUR, "dash": "dash"}
    return [go.Scatter(x=[s.record.step for s in steps], y=values, name=name, mode="lines", line=style)]


def _forecast(steps: Sequence[Observed], axis: Axis) -> go.Figure:
    forecast = [(step.record.step, step.risk.peak) for step in steps if step.risk.peak is not None]
    numbers = [number for number, _ in forecast]
    style = {"color": FORECAST_COLOUR}
    upper = [axis(peak.predicted_bytes + peak.band_bytes) for _, peak in forecast]
    lower = [axis(peak.predicted_bytes - peak.band_bytes) for _, peak in forecast]
    traces = [
        go.Scatter(
            x=[step.record.step for step in steps],
            y=[axis(step.peak_bytes) for step in steps],
            name="peak of the step",
            mode="lines",
            line={"color": PEAK_COLOUR},
        ),
        go.Scatter(x=numbers, y=upper, name="95 % band, upper", mode="lines", line={"width": 0}, showlegend=False),
        go.Scatter(
            x=numbers,
            y=lower,
            name="95 % band",
            mode="lines",
            line={"width": 0},
            fill="tonexty",
            fillcolor="rgba(201,138,27,0.2)",
        ),
        go.Scatter(
            x=numbers,
            y=[axis(peak.predicted_bytes) for _, peak in forecast],
            name="forecast",
            mode="lines",
            line=style,
        ),
        *_line("capacity", steps, lambda step: step.risk.capacity_bytes, axis),
    ]
    return _figure(axis, "step", traces)


def _whose_forecast(step: Observed) -> str:
    peak = step.risk.peak
    if peak is None:
        return "No batch is known that a peak could be forecast for."
    if peak.batch.source is ShapeSource.LONGEST_SEEN:
        return (
            "The largest batch seen so far, as its peak was forecast after each step. --max-tokens looks further ahead."
        )
    return f"A micro batch of {peak.batch.tokens} tokens, as its peak was forecast after each step."


def _timeline(curve: StepCurve) -> go.Figure:
    """Returns the curve of a step, with a line at each moment. Each point holds until the next one."""
    categories = [curve.by_category[category] for category in curve.by_category]
    axis = Axis(max((sum(sizes) for sizes in zip(*categories, strict=True)), default=0))
    milliseconds = [1000 * second for second in curve.seconds]
    traces = [
        go.Scatter(
            x=milliseconds,
            y=[axis(size) for size in sizes],
            name=category.value,
            stackgroup="bytes",
            mode="lines",
            line={"width": 0.5, "color": COLOURS[category], "shape": "hv"},
            fillcolor=COLOURS[category],
        )
        for category, sizes in curve.by_category.items()
    ]
    figure = _figure(axis, "milliseconds since the step began", traces)
    for second, moments in _together(curve, milliseconds[-1] if milliseconds else 0).items():
        figure.add_vline(x=second, line={"color": CAPACITY_COLOUR, "dash": "dot", "width": 1})
        figure.add_annotation(
            x=second,
            y=1,
            yref="paper",
            text=", ".join(_MOMENT_NAMES[moment] for moment in moments),
            textangle=-90,
            showarrow=False,
            xanchor="right",
            yanchor="top",
            font={"size": 11},
        )
    return figure


def _together(curve: StepCurve, length: float) -> Mapping[float, list[Moment]]:
    """Returns the moments by their time in milliseconds; those too near each other to be told apart share one."""
    groups: dict[float, list[Moment]] = {}
    for moment, second in sorted(curve.moments.items(), key=lambda item: item[1]):
        near = next((time for time in groups if 1000 * second - time <= NEAR * length), None)
        groups.setdefault(1000 * second if near is None else near, []).append(moment)
    return groups


def _tokens(steps: Sequence[Observed], axis: Axis) -> go.Figure:
    with_batch = [(step.record.batch, step.peak_bytes) for step in steps if step.record.batch is not None]
    traces = [
        go.Scatter(
            x=[batch.largest_micro_batch_tokens for batch, _ in with_batch],
            y=[axis(peak) for _, peak in with_batch],
            name="steps",
            mode="markers",
            marker={"color": PEAK_COLOUR, "size": 6, "opacity": 0.6},
        )
    ]
    peak = steps[-1].risk.peak
    if peak is not None:
        traces.append(
            go.Scatter(
                x=[peak.batch.tokens],
                y=[axis(peak.predicted_bytes)],
                error_y={"type": "constant", "value": axis(peak.band_bytes)},
                name="forecast",
                mode="markers",
                marker={"color": FORECAST_COLOUR, "size": 12, "symbol": "x"},
            )
        )
    return _figure(axis, "tokens of the largest micro batch", traces).update_layout(hovermode="closest")


def _moments(step: Observed, axis: Axis) -> go.Figure:
    moments = step.record.moments
    shown = [moment for moment in _MOMENT_NAMES if moment in moments]
    return _stacked([_MOMENT_NAMES[moment] for moment in shown], [moments[moment] for moment in shown], axis)


def _ranks(ranks: Sequence[RankHistory], axis: Axis) -> go.Figure:
    highest = [
        max(rank.with_peak, key=lambda step: step.peak_bytes or 0).record.moments[Moment.PEAK]
        for rank in ranks
        if rank.with_peak
    ]
    return _stacked([f"rank {rank.rank}" for rank in ranks if rank.with_peak], highest, axis)


def _stacked(names: Sequence[str], breakdowns: Sequence[Breakdown], axis: Axis) -> go.Figure:
    traces = [
        go.Bar(
            x=list(names),
            y=[axis(breakdown[category]) for breakdown in breakdowns],
            name=category.value,
            marker_color=COLOURS[category],
        )
        for category in _present(breakdowns)
    ]
    return _figure(axis, "", traces, barmode="stack")


def _allocator(rank: RankHistory, axis: Axis) -> go.Figure:
    readings = [(step.record.step, step.record.allocator) for step in rank.steps if step.record.allocator is not None]
    lines: Mapping[str, list[float | None]] = {
        "reserved": [axis(reading.reserved_bytes) for _, reading in readings],
        "in use": [axis(reading.allocated_bytes) for _, reading in readings],
    }
    traces = [go.Scatter(x=[step for step, _ in readings], y=y, name=name, mode="lines") for name, y in lines.items()]
    return _figure(axis, "step", traces)


def _present(breakdowns: Iterator[Breakdown] | Sequence[Breakdown]) -> list[Category]:
    held = {key.category for breakdown in breakdowns for key in breakdown.entries}
    return [category for category in Category if category in held]
