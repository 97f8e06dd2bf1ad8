"""The kinds of panels that the dashboards are made of, each with the settings that all of its kind share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from grafana_foundation_sdk.builders import bargauge, stat, table, timeseries, xychart
from grafana_foundation_sdk.builders import common as shared
from grafana_foundation_sdk.builders import dashboard as board
from grafana_foundation_sdk.builders import prometheus as queries
from grafana_foundation_sdk.models import common as shared_words
from grafana_foundation_sdk.models import dashboard as words
from grafana_foundation_sdk.models import prometheus as query_words
from grafana_foundation_sdk.models import xychart as xy_words

SOURCE = words.DataSourceRef(type_val="prometheus", uid="${datasource}")

NEUTRAL, CALM, WATCH, ALARM = "#8e9bb0", "#3f8f5f", "#e0a32e", "#c4162a"
"""Colours of levels. Alarm is for what an alert fires on, and for nothing else."""
CAPACITY_COLOUR, FORECAST_COLOUR, PEAK_COLOUR = "#d8d9da", "#e0a32e", "#5794f2"

WIDE, HALF, THIRD = 24, 12, 8
GRAPH_HEIGHT, STAT_HEIGHT = 9, 4

_Panel = TypeVar("_Panel", timeseries.Panel, stat.Panel, bargauge.Panel, table.Panel, xychart.Panel)

NOT_THEN = "nothing of this run at the end of the time shown"
NOT_THERE = "nothing in the time shown"
"""What a panel says that has nothing to show: as of now, and over time."""
NO_CELL = "-"
"""What a cell of a table says that has nothing to show."""

Query = tuple[str, str]
"""An expression and the legend of its series."""
Levels = Iterable[tuple[float | None, str]]
"""Colours with the value from which each applies; the first one from None on."""


def graph(
    title: str,
    description: str,
    targets: Iterable[Query],
    *,
    unit: str,
    width: int = HALF,
    colours: Mapping[str, str] | None = None,
    stacked: bool = False,
    columns: bool = False,
    lines: Iterable[str] = (),
    top: float | None = None,
    none: str = NOT_THERE,
) -> timeseries.Panel:
    """Returns curves over time.

    Args:
        title: what the panel shows.
        description: how to read it.
        targets: the queries.
        unit: Grafana's name of the unit.
        width: of 24 columns.
        colours: by legend; what is not in it gets one of the palette.
        stacked: whether the series add up.
        columns: whether each point is a column, for counts that are nearly always 0, which then draw nothing. A column
            stands for a minute at least.
        lines: legends that are drawn as a dashed line instead, on top of what is stacked.
        top: where the axis ends at least.
        none: shown where there is no series.
    """
    panel = (
        timeseries.Panel()
        .unit(unit)
        .min(0)
        .no_value(none)
        .line_width(1)
        .fill_opacity(70 if stacked else 0)
        .show_points(shared_words.VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(
            shared.VizLegendOptions()
            .show_legend(True)
            .display_mode(shared_words.LegendDisplayMode.TABLE if stacked else shared_words.LegendDisplayMode.LIST)
            .placement(shared_words.LegendPlacement.RIGHT if stacked else shared_words.LegendPlacement.BOTTOM)
            .calcs(["max"] if stacked else [])
        )
        .tooltip(
            shared.VizTooltipOptions()
            .mode(shared_words.TooltipDisplayMode.MULTI)
            .sort(shared_words.SortOrder.NONE if stacked else shared_words.SortOrder.DESCENDING)
        )
    )
    if stacked:
        panel = panel.stacking(shared.StackingConfig().mode(shared_words.StackingMode.NORMAL).group("A"))
    if columns:
        panel = (
            panel.draw_style(shared_words.GraphDrawStyle.BARS)
            .fill_opacity(100)
            .line_width(0)
            .decimals(0)
            .interval("1m")
        )
    if top is not None:
        panel = panel.axis_soft_max(top)
    for name in lines:
        panel = panel.override_by_name(name, _dashed())
    for name, colour in (colours or {}).items():
        panel = panel.override_by_name(name, [_fixed(colour)])
    return _finish(panel, title, description, targets, width=width, height=GRAPH_HEIGHT)


def scatter(title: str, description: str, x: Query, y: Query, *, units: tuple[str, str], colour: str) -> xychart.Panel:
    """Returns one point for each moment at which both queries have a value; their legends name the axes."""
    series = (
        xychart.XYSeriesConfig()
        .frame(xychart.XychartXYSeriesConfigFrame().matcher(xychart.MatcherConfig().id("byIndex").options(0)))
        .x(xychart.XychartXYSeriesConfigX().matcher(xychart.MatcherConfig().id("byName").options(x[1])))
        .y(xychart.XychartXYSeriesConfigY().matcher(xychart.MatcherConfig().id("byName").options(y[1])))
    )
    panel = (
        xychart.Panel()
        .show(xy_words.XYShowMode.POINTS)
        .mapping(xy_words.SeriesMapping.MANUAL)
        .series([series])
        .legend(shared.VizLegendOptions().show_legend(False))
        .tooltip(shared.VizTooltipOptions().mode(shared_words.TooltipDisplayMode.SINGLE))
        .with_transformation(transformation("joinByField", byField="Time", mode="inner"))
    )
    for (_, name), unit in zip((x, y), units, strict=True):
        panel = panel.override_by_name(
            name, [_setting("unit", unit), _setting("custom.axisLabel", name), _fixed(colour)]
        )
    return _finish(panel.unit(units[1]), title, description, [x, y], width=THIRD, height=GRAPH_HEIGHT)


def number(
    title: str,
    description: str,
    *targets: Query,
    unit: str,
    levels: Levels,
    width: int = 6,
    none: str = "not known",
    now: bool = False,
) -> stat.Panel:
    """Returns the last figure of the time shown, or several with their names; with `now`, the figure at its end.

    `none` is shown where there is no series.
    """
    panel = (
        stat.Panel()
        .unit(unit)
        .no_value(none)
        .thresholds(_thresholds(levels))
        .color_mode(shared_words.BigValueColorMode.VALUE)
        .graph_mode(shared_words.BigValueGraphMode.NONE)
        .reduce_options(shared.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    if len(targets) > 1:
        panel = panel.text_mode(shared_words.BigValueTextMode.VALUE_AND_NAME)
    return _finish(panel, title, description, targets, width=width, height=STAT_HEIGHT, instant=now)


def bars(title: str, description: str, target: Query, *, levels: Levels, width: int = HALF) -> bargauge.Panel:
    """Returns one bar for each series, from 0 to 1, as of now."""
    panel = (
        bargauge.Panel()
        .unit("percentunit")
        .min(0)
        .max(1)
        .no_value(NOT_THEN)
        .thresholds(_thresholds(levels))
        .orientation(shared_words.VizOrientation.HORIZONTAL)
        .display_mode(shared_words.BarGaugeDisplayMode.BASIC)
        .reduce_options(shared.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    return _finish(panel, title, description, [target], width=width, height=GRAPH_HEIGHT, instant=True)


def rows(
    title: str,
    description: str,
    targets: Iterable[Query],
    *,
    unit: str,
    transformations: Iterable[words.DataTransformerConfig],
    width: int = HALF,
    units: Mapping[str, str] | None = None,
    links: Mapping[str, object] | None = None,
    texts: Mapping[str, Mapping[int, tuple[str, str]]] | None = None,
    widths: Mapping[str, int] | None = None,
    height: int = GRAPH_HEIGHT,
    none: str = NOT_THEN,
) -> table.Panel:
    """Returns a table as of now; the transformations make its rows and columns.

    Columns may have units, links and widths of their own, and coloured texts in place of whole numbers; `none` is shown
    where there is no row.
    """
    panel = table.Panel().unit(unit).min_width(90).no_value(none)
    panel = panel.override_by_regexp(".*", [_setting("noValue", NO_CELL)])
    panel = panel.override_by_name("rank", [_setting("unit", "none")])
    for name, own in (units or {}).items():
        panel = panel.override_by_name(name, [_setting("unit", own)])
    for name, link in (links or {}).items():
        panel = panel.override_by_name(name, [_setting("links", [link])])
    for name, pixels in (widths or {}).items():
        panel = panel.override_by_name(name, [_setting("custom.width", pixels)])
    for name, of_number in (texts or {}).items():
        options = {
            str(number): {"text": text, "color": colour, "index": number}
            for number, (text, colour) in of_number.items()
        }
        mapped = [
            _setting("mappings", [{"type": "value", "options": options}]),
            _setting("custom.cellOptions", {"type": "color-text"}),
        ]
        panel = panel.override_by_name(name, mapped)
    for transformation in transformations:
        panel = panel.with_transformation(transformation)
    return _finish(panel, title, description, targets, width=width, height=height, instant=True, as_table=True)


def transformation(name: str, **options: object) -> words.DataTransformerConfig:
    """Returns a transformation of what the queries found."""
    return words.DataTransformerConfig(id_val=name, options=options)


def variable(name: str, label: str, query: str, *, multi: bool = True) -> board.QueryVariable:
    """Returns a variable whose values are those of a label; with `multi`, several or all of them."""
    made = (
        board.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": query, "refId": f"variable-{name}", "qryType": 1})
        .refresh(words.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(words.VariableSort.NATURAL_ASC)
        .multi(multi)
        .include_all(multi)
    )
    return made.all_value(".+").current(words.VariableOption(text="All", value="$__all")) if multi else made


def highest_first(
    name: str, label: str, query: str, *, multi: bool = False, values_of: str | None = None
) -> board.QueryVariable:
    """Returns a variable whose values are those of a label, by what the query says; the highest first.

    The label is that of the variable's name unless told otherwise. Grafana takes the first value where nothing is
    chosen; with `multi`, several can be.
    """
    return (
        board.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query({"query": f"query_result(sort_desc({query}))", "refId": f"variable-{name}", "qryType": 3})
        .regex(f'/{values_of or name}="([^"]*)"/')
        .refresh(words.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(words.VariableSort.DISABLED)
        .multi(multi)
    )


def _finish(
    panel: _Panel,
    title: str,
    description: str,
    targets: Iterable[Query],
    *,
    width: int,
    height: int,
    instant: bool = False,
    as_table: bool = False,
) -> _Panel:
    """Returns the panel with what every kind has: words, place and queries."""
    panel = panel.title(title).description(description).datasource(SOURCE).height(height).span(width)
    for letter, (expression, legend) in zip("ABCDEFGHIJKLMNOP", targets, strict=False):
        query = queries.Dataquery().expr(expression).legend_format(legend).ref_id(letter).datasource(SOURCE)
        query = query.instant() if instant else query.range()
        if as_table:
            query = query.format(query_words.PromQueryFormat.TABLE)
        panel = panel.with_target(query)
    return panel


def _thresholds(levels: Levels) -> board.ThresholdsConfig:
    steps = [words.Threshold(value=value, color=colour) for value, colour in levels]
    return board.ThresholdsConfig().mode(words.ThresholdsMode.ABSOLUTE).steps(steps)


def _fixed(colour: str) -> words.DynamicConfigValue:
    return _setting("color", {"mode": "fixed", "fixedColor": colour})


def _dashed() -> list[words.DynamicConfigValue]:
    return [
        _setting("custom.stacking", {"mode": "none", "group": "A"}),
        _setting("custom.fillOpacity", 0),
        _setting("custom.lineWidth", 2),
        _setting("custom.lineStyle", {"fill": "dash", "dash": [8, 8]}),
    ]


def _setting(name: str, value: object) -> words.DynamicConfigValue:
    return words.DynamicConfigValue(name, value)
