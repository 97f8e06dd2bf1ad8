// One dashboard on one page: index.html?dashboard=FILE&prometheus=URL[&from=now-1h&to=now&var-rank=0&var-rank=1]
import { createTheme, rangeUtil, ThemeContext } from '@grafana/data';
import { GlobalStyles } from '@grafana/ui';
import { createRoot } from 'react-dom/client';
import './fields';
import { Panel } from './panels';
import { runTarget, type Context } from './prometheus';
import { report, wrong } from './report';
import { resolve } from './variables';

const PAGE_WIDTH = 1400;
const COLUMNS = 24;
const ROW_HEIGHT = 38;

async function main(): Promise<void> {
  const given = new URLSearchParams(location.search);
  const dashboard = await (await fetch(given.get('dashboard')!)).json();
  const prometheus = given.get('prometheus')!;
  const raw = { from: given.get('from') ?? dashboard.time.from, to: given.get('to') ?? dashboard.time.to };
  const range = rangeUtil.convertRawToRange(raw as any);
  const values = await resolve(dashboard.templating?.list ?? [], given, prometheus, range);
  const context: Context = { prometheus, range, values };
  for (const annotation of dashboard.annotations?.list ?? []) {
    await runTarget({ expr: annotation.expr }, PAGE_WIDTH, context)
      .then((marks) => (report.annotations[annotation.name] = marks.length))
      .catch((error) => wrong(`annotation "${annotation.name}": ${error.message}`));
  }
  const panels = dashboard.panels.flatMap((panel: any) => [panel, ...(panel.panels ?? [])]);
  report.panels = panels.filter((panel: any) => panel.type !== 'row').length;
  draw(dashboard.title, panels, context);
}

function draw(title: string, panels: any[], context: Context): void {
  const theme = createTheme({ colors: { mode: 'dark' } });
  const column = PAGE_WIDTH / COLUMNS;
  const bottom = Math.max(...panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  const place = ({ x, y, w, h }: any) => ({
    position: 'absolute' as const,
    left: x * column + 4,
    top: y * ROW_HEIGHT,
    width: w * column - 8,
    height: h * ROW_HEIGHT - 8,
  });
  createRoot(document.getElementById('root')!).render(
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <h3 style={{ margin: 8 }}>{title}</h3>
      <div style={{ position: 'relative', width: PAGE_WIDTH, height: bottom * ROW_HEIGHT }}>
        {panels.map((panel) => (
          <div key={panel.id} style={place(panel.gridPos)}>
            {panel.type === 'row' ? (
              <h4 style={{ margin: '8px 0' }}>{panel.title}</h4>
            ) : (
              <Panel
                panel={panel}
                width={panel.gridPos.w * column - 8}
                height={panel.gridPos.h * ROW_HEIGHT - 8}
                context={context}
                theme={theme}
              />
            )}
          </div>
        ))}
      </div>
    </ThemeContext.Provider>
  );
}

main().catch((error) => wrong(`page: ${error.message}`));
