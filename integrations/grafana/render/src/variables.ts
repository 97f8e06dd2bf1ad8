// Template variables: their values, as Grafana would find them, and their place in a query.
import type { TimeRange } from '@grafana/data';
import { wrong } from './report';

export type Values = Record<string, string[]>;

const ESCAPED = /[\\^$*+?.()|[\]{}"]/g;
const quoteRegex = (value: string) => value.replace(ESCAPED, (sign) => `\\\\${sign}`);

const FORMATS: Record<string, (values: string[]) => string> = {
  // Grafana's own format for Prometheus: one value as it is, several as an alternation of regular expressions.
  '': (values) => (values.length === 1 ? values[0] : `(${values.map(quoteRegex).join('|')})`),
  raw: (values) => values.join(','),
  csv: (values) => values.join(','),
  pipe: (values) => values.join('|'),
  regex: (values) => (values.length === 1 ? quoteRegex(values[0]) : `(${values.map(quoteRegex).join('|')})`),
  json: (values) => JSON.stringify(values),
};

/** Returns the text with every variable replaced; an unknown variable or format is an error of the dashboard. */
export function interpolate(text: string, values: Values): string {
  return text.replace(/\$\{(\w+)(?::(\w+))?\}|\$([A-Za-z_]\w*)|\[\[(\w+)\]\]/g, (all, braced, format, plain, old) => {
    const name = braced ?? plain ?? old;
    if (!(name in values)) {
      wrong(`unresolved variable ${all} in ${text}`);
      return all;
    }
    const write = FORMATS[format ?? ''];
    if (write === undefined) {
      wrong(`unknown format of variable ${all}`);
      return all;
    }
    return write(values[name]);
  });
}

/** Returns the values of all variables of a dashboard; what the page's address says of one goes first. */
export async function resolve(list: any[], given: URLSearchParams, prometheus: string, range: TimeRange): Promise<Values> {
  const builtIn: Values = { __range: [`${Math.round((Number(range.to) - Number(range.from)) / 1000)}s`] };
  const values: Values = {};
  for (const variable of list) {
    const chosen = given.getAll(`var-${variable.name}`);
    if (variable.type === 'datasource') {
      values[variable.name] = ['prometheus'];
    } else if (variable.type === 'query') {
      const options = await valuesOf(variable, { ...builtIn, ...values }, prometheus, range);
      if (options.length === 0) {
        wrong(`variable ${variable.name} has no values`);
      }
      const fallback = variable.includeAll ? (variable.allValue ? [variable.allValue] : options) : options.slice(0, 1);
      values[variable.name] = chosen.length > 0 ? chosen : fallback;
    } else {
      wrong(`unknown type of variable ${variable.name}: ${variable.type}`);
    }
  }
  return values;
}

async function valuesOf(variable: any, values: Values, prometheus: string, range: TimeRange): Promise<string[]> {
  const query = typeof variable.query === 'string' ? variable.query : variable.query.query;
  const labels = /^label_values\((.+),\s*(\w+)\)$/.exec(query);
  const result = /^query_result\((.+)\)$/.exec(query);
  if (labels === null && result === null) {
    wrong(`variable ${variable.name}: cannot read ${query}`);
    return [];
  }
  const parameters = labels
    ? `label/${labels[2]}/values?match[]=${encodeURIComponent(interpolate(labels[1], values))}`
    : `query?time=${Number(range.to) / 1000}&query=${encodeURIComponent(interpolate(result![1], values))}`;
  const answer = await (await fetch(`${prometheus}/api/v1/${parameters}`)).json();
  if (answer.status !== 'success') {
    wrong(`variable ${variable.name}: ${answer.error}`);
    return [];
  }
  return labels ? answer.data : matched(variable.regex, answer.data.result);
}

/** Returns what the variable's regular expression finds in each series, as Grafana writes one: `{run="chat"} 1 0`. */
function matched(regex: string, result: any[]): string[] {
  const pattern = new RegExp(regex.replace(/^\/|\/$/g, ''));
  const written = result.map(({ metric, value }: any) => {
    const labels = Object.entries(metric).map(([name, text]) => `${name}="${text}"`);
    return `{${labels.join(',')}} ${value[1]} ${value[0]}`;
  });
  return [...new Set(written.map((text) => pattern.exec(text)?.[1]).filter((text) => text !== undefined))] as string[];
}
