// Queries: from a panel's targets to data frames.
import { FieldType, rangeUtil, toDataFrame, type DataFrame, type TimeRange } from '@grafana/data';
import { interpolate, type Values } from './variables';

export interface Context {
  prometheus: string;
  range: TimeRange;
  values: Values;
}

const SCRAPE_SECONDS = 15;

/** Runs a target with the built-in variables that Grafana would set; `least` is the panel's own interval. */
export async function runTarget(target: any, points: number, context: Context, least?: string): Promise<DataFrame[]> {
  const from = Number(context.range.from) / 1000;
  const to = Number(context.range.to) / 1000;
  const shortest = least ? rangeUtil.intervalToSeconds(least) : SCRAPE_SECONDS;
  const step = Math.max(shortest, Math.ceil((to - from) / points));
  const builtIn: Values = {
    __interval: [`${step}s`],
    __interval_ms: [`${step * 1000}`],
    __rate_interval: [`${Math.max(step + SCRAPE_SECONDS, 4 * SCRAPE_SECONDS)}s`],
    __range: [`${Math.round(to - from)}s`],
  };
  const expression = interpolate(target.expr, { ...builtIn, ...context.values });
  const instant = Boolean(target.instant) && !target.range;
  const parameters = new URLSearchParams(
    instant
      ? { query: expression, time: String(to) }
      : { query: expression, start: String(from), end: String(to), step: String(step) }
  );
  const answer = await fetch(`${context.prometheus}/api/v1/${instant ? 'query' : 'query_range'}`, {
    method: 'POST',
    body: parameters,
  });
  const body = await answer.json();
  if (body.status !== 'success') {
    throw new Error(`${target.refId ?? ''} ${body.error} in ${expression}`);
  }
  if (target.format === 'table') {
    return [tableFrame(target, body.data.result)];
  }
  return body.data.result.map((series: any) => seriesFrame(target, series, instant, step));
}

function tableFrame(target: any, result: any[]): DataFrame {
  const labels = [...new Set(result.flatMap((row) => Object.keys(row.metric)))].filter((name) => name !== '__name__');
  return toDataFrame({
    refId: target.refId,
    fields: [
      { name: 'Time', type: FieldType.time, values: result.map((row) => row.value[0] * 1000) },
      ...labels.map((name) => ({ name, type: FieldType.string, values: result.map((row) => row.metric[name] ?? '') })),
      { name: target.valueName ?? 'Value', type: FieldType.number, values: result.map((row) => Number(row.value[1])) },
    ],
  });
}

function seriesFrame(target: any, series: any, instant: boolean, step: number): DataFrame {
  const { __name__, ...labels } = series.metric;
  const points = instant ? [series.value] : series.values;
  const name = target.legendFormat
    ? target.legendFormat.replace(/\{\{\s*(\w+)\s*\}\}/g, (_: string, label: string) => labels[label] ?? '')
    : JSON.stringify(labels);
  return toDataFrame({
    refId: target.refId,
    name,
    fields: [
      {
        name: 'Time',
        type: FieldType.time,
        config: { interval: step * 1000 },
        values: points.map((point: any) => point[0] * 1000),
      },
      {
        name: 'Value',
        type: FieldType.number,
        labels,
        config: { displayNameFromDS: name },
        values: points.map((point: any) => Number(point[1])),
      },
    ],
  });
}
