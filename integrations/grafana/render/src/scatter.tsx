// XY charts. Their panel is part of Grafana's application; the plot below it is part of the library.
import { getFieldMatcher, type DataFrame, type Field } from '@grafana/data';
import { AxisPlacement, GraphDrawStyle, ScaleDirection, ScaleOrientation, VisibilityMode } from '@grafana/schema';
import { UPlotChart, UPlotConfigBuilder } from '@grafana/ui';
import { useMemo } from 'react';
import type { DrawProps } from './panels';

function choose(matcher: any, frame: DataFrame, frames: DataFrame[]): Field {
  const found = frame.fields.find((field) => getFieldMatcher(matcher)(field, frame, frames));
  if (found === undefined) {
    throw new Error(`no field ${JSON.stringify(matcher)}`);
  }
  return found;
}

/** Draws the points of an XY chart's one series, mapped by hand, as all of ours are. */
export function Scatter({ panel, frames, width, height, theme }: DrawProps) {
  const [config, data] = useMemo(() => {
    const [series] = panel.options.series;
    const frame = frames[series.frame.matcher.options];
    const [x, y] = [choose(series.x.matcher, frame, frames), choose(series.y.matcher, frame, frames)];
    const order = [...x.values.keys()].sort((one, other) => x.values[one] - x.values[other]);
    const builder = new UPlotConfigBuilder('utc');
    builder.addScale({ scaleKey: 'x', orientation: ScaleOrientation.Horizontal, direction: ScaleDirection.Right, isTime: false });
    builder.addScale({ scaleKey: 'y', orientation: ScaleOrientation.Vertical, direction: ScaleDirection.Up });
    for (const [scaleKey, field, placement] of [['x', x, AxisPlacement.Bottom], ['y', y, AxisPlacement.Left]] as const) {
      const text = (value: number) => ((shown) => `${shown.text}${shown.suffix ?? ''}`)(field.display!(value));
      const label = field.config.custom?.axisLabel;
      builder.addAxis({ scaleKey, placement, theme, label, values: (_, splits) => splits.map(text) });
    }
    builder.addSeries({
      scaleKey: 'y',
      theme,
      drawStyle: GraphDrawStyle.Points,
      showPoints: VisibilityMode.Always,
      pointSize: 5,
      lineColor: y.config.color!.fixedColor,
      pointColor: y.config.color!.fixedColor,
    });
    return [builder, [order.map((index) => x.values[index]), order.map((index) => y.values[index])]];
  }, [panel, frames]);
  return <UPlotChart config={config} data={data as any} width={width} height={height} />;
}
