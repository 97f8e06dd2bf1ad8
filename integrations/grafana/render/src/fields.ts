// Field settings: the registries that Grafana's application fills and its libraries only read.
import {
  applyFieldOverrides,
  displayNameOverrideProcessor,
  FieldConfigOptionsRegistry,
  identityOverrideProcessor,
  numberOverrideProcessor,
  standardFieldConfigEditorRegistry,
  standardTransformers,
  standardTransformersRegistry,
  stringOverrideProcessor,
  thresholdsOverrideProcessor,
  unitOverrideProcessor,
  valueMappingsOverrideProcessor,
  type DataFrame,
  type GrafanaTheme2,
} from '@grafana/data';

const STANDARD: Array<[string, any]> = [
  ['unit', unitOverrideProcessor],
  ['min', numberOverrideProcessor],
  ['max', numberOverrideProcessor],
  ['decimals', numberOverrideProcessor],
  ['displayName', displayNameOverrideProcessor],
  ['noValue', stringOverrideProcessor],
  ['thresholds', thresholdsOverrideProcessor],
  ['mappings', valueMappingsOverrideProcessor],
  ['color', identityOverrideProcessor],
  ['links', identityOverrideProcessor],
  ['filterable', identityOverrideProcessor],
];

/** Settings of the fields of time series and XY charts, with the application's defaults. */
const SERIES: Record<string, unknown> = {
  drawStyle: 'line',
  lineInterpolation: 'linear',
  lineWidth: 1,
  lineStyle: { fill: 'solid' },
  fillOpacity: 0,
  gradientMode: 'none',
  showPoints: 'auto',
  pointSize: 5,
  stacking: { mode: 'none', group: 'A' },
  axisPlacement: 'auto',
  axisLabel: '',
  axisColorMode: 'text',
  axisBorderShow: false,
  axisCenteredZero: false,
  scaleDistribution: { type: 'linear' },
  hideFrom: { tooltip: false, viz: false, legend: false },
  axisSoftMax: undefined,
  thresholdsStyle: { mode: 'off' },
  spanNulls: false,
  insertNulls: false,
};

/** Settings of the cells of tables. */
const CELLS = ['minWidth', 'width', 'cellOptions'];

function item(id: string, path: string, process: any, isCustom: boolean): any {
  const nothing = () => null;
  return { id, path, name: path, isCustom, process, shouldApply: () => true, override: nothing, editor: nothing, settings: {} };
}

standardFieldConfigEditorRegistry.setInit(() => STANDARD.map(([path, process]) => item(path, path, process, false)));
// Some are listed twice, under an old name and a new one.
const TRANSFORMERS = new Map(Object.values(standardTransformers).map((found: any) => [found.id, found]));
standardTransformersRegistry.setInit(
  () => [...TRANSFORMERS].map(([id, transformation]) => ({ id, name: id, transformation, editor: () => null })) as any
);

const registry = new FieldConfigOptionsRegistry(() => [
  ...(standardFieldConfigEditorRegistry.list() as any[]),
  ...[...Object.keys(SERIES), ...CELLS].map((path) => item(`custom.${path}`, path, identityOverrideProcessor, true)),
]);

/** Returns the frames with a panel's field settings and overrides applied. */
export function applyFields(frames: DataFrame[], panel: any, theme: GrafanaTheme2): DataFrame[] {
  const settings = structuredClone(panel.fieldConfig ?? { defaults: {} });
  settings.overrides ??= [];
  const series = ['timeseries', 'xychart'].includes(panel.type);
  settings.defaults.custom = series ? { ...SERIES, ...settings.defaults.custom } : (settings.defaults.custom ?? {});
  settings.defaults.color ??= { mode: series ? 'palette-classic' : 'thresholds' };
  return applyFieldOverrides({
    data: frames,
    fieldConfig: settings,
    replaceVariables: (text) => text,
    theme,
    timeZone: 'utc',
    fieldConfigRegistry: registry,
  });
}
