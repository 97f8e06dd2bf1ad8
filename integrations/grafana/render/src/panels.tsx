// Panels: the data of each, and the component of Grafana's library that draws its type.
import { getFieldDisplayValues, transformDataFrame, type DataFrame, type GrafanaTheme2 } from '@grafana/data';
import { BarGauge, BigValue, PanelChrome, Table, TimeSeries, VizRepeater } from '@grafana/ui';
import { useEffect, useState } from 'react';
import { lastValueFrom } from 'rxjs';
import { applyFields } from './fields';
import { Scatter } from './scatter';
import { runTarget, type Context } from './prometheus';
import { report, wrong } from './report';

export interface DrawProps {
  panel: any;
  frames: DataFrame[];
  width: number;
  height: number;
  context: Context;
  theme: GrafanaTheme2;
}

const DRAW: Record<string, (props: DrawProps) => JSX.Element> = {
  timeseries: ({ panel, frames, width, height, context }) => (
    <TimeSeries
      frames={frames}
      width={width}
      height={height}
      timeRange={context.range}
      timeZone="utc"
      legend={{ showLegend: true, displayMode: 'list', placement: 'bottom', calcs: [], ...panel.options?.legend } as any}
      options={panel.options ?? {}}
    />
  ),
  stat: (props) => (
    <Repeated
      {...props}
      draw={({ value, width, height, count }: any) => (
        <BigValue
          value={value.display}
          sparkline={value.sparkline}
          width={width}
          height={height}
          colorMode={props.panel.options?.colorMode ?? 'value'}
          graphMode={props.panel.options?.graphMode ?? 'area'}
          textMode={props.panel.options?.textMode ?? 'auto'}
          justifyMode={props.panel.options?.justifyMode ?? 'auto'}
          theme={props.theme}
          count={count}
        />
      )}
    />
  ),
  bargauge: (props) => (
    <Repeated
      {...props}
      draw={({ value, width, height, orientation }: any) => (
        <BarGauge
          value={value.display}
          field={value.field}
          display={value.view?.getFieldDisplayProcessor(value.colIndex)}
          width={width}
          height={height}
          orientation={orientation}
          displayMode={props.panel.options?.displayMode ?? 'gradient'}
          theme={props.theme}
          isOverflow={false}
          itemSpacing={8}
          lcdCellWidth={12}
          showUnfilled
        />
      )}
    />
  ),
  xychart: (props) => <Scatter {...props} />,
  table: ({ panel, frames, width, height }) => (
    <Table data={frames[0]} width={width} height={height} fieldConfig={panel.fieldConfig} />
  ),
};

function Repeated({ panel, frames, width, height, theme, draw }: DrawProps & { draw: (props: any) => JSX.Element }) {
  const reduceOptions = { calcs: ['lastNotNull'], values: false, ...panel.options?.reduceOptions };
  const sparkline = panel.type === 'stat' && panel.options?.graphMode !== 'none';
  const getValues = () =>
    getFieldDisplayValues({
      fieldConfig: panel.fieldConfig,
      reduceOptions,
      replaceVariables: (text: string) => text,
      theme,
      data: frames,
      sparkline,
      timeZone: 'utc',
    } as any);
  return (
    <VizRepeater
      getValues={getValues}
      renderValue={draw as any}
      source={frames}
      width={width}
      height={height}
      orientation={panel.options?.orientation ?? 'auto'}
      itemSpacing={8}
      renderCounter={0}
      autoGrid={panel.type === 'stat'}
      minVizHeight={16}
    />
  );
}

async function load(panel: any, width: number, context: Context, theme: GrafanaTheme2): Promise<DataFrame[]> {
  if (DRAW[panel.type] === undefined) {
    throw new Error(`unknown panel type ${panel.type}`);
  }
  const targets = (panel.targets ?? []).filter((target: any) => !target.hide);
  const named = targets.map((target: any) =>
    target.format === 'table' && targets.length > 1 ? { ...target, valueName: `Value #${target.refId}` } : target
  );
  let frames = (await Promise.all(named.map((target: any) => runTarget(target, width, context, panel.interval)))).flat();
  if (panel.transformations?.length) {
    frames = await lastValueFrom(transformDataFrame(panel.transformations, frames));
  }
  if (frames.every((frame) => frame.length === 0)) {
    if (panel.fieldConfig?.defaults?.noValue === undefined) {
      throw new Error('no data');
    }
    report.empty.push(panel.title);
  }
  return applyFields(frames, panel, theme);
}

export function Panel({ panel, width, height, context, theme }: Omit<DrawProps, 'frames'>) {
  const [state, setState] = useState<{ frames?: DataFrame[]; error?: string }>({});
  useEffect(() => {
    load(panel, width, context, theme)
      .then((frames) => setState({ frames }))
      .catch((error) => {
        wrong(`panel "${panel.title}": ${error.message}`);
        setState({ error: error.message });
      })
      .finally(() => (report.drawn += 1));
  }, []);
  const Draw = DRAW[panel.type];
  return (
    <PanelChrome title={panel.title} description={panel.description} width={width} height={height}>
      {(innerWidth, innerHeight) => {
        if (state.error !== undefined) {
          return <pre>{state.error}</pre>;
        }
        if (state.frames === undefined) {
          return <span />;
        }
        const props = { panel, frames: state.frames, width: innerWidth, height: innerHeight, context, theme };
        return state.frames.length > 0 ? <Draw {...props} /> : <h2>{panel.fieldConfig.defaults.noValue}</h2>;
      }}
    </PanelChrome>
  );
}
