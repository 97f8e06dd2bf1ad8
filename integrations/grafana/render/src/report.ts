// What the test reads from the page: how far it is, and everything that is wrong with the dashboard.

export interface Report {
  panels: number;
  drawn: number;
  /** How many series the query of each annotation found. */
  annotations: Record<string, number>;
  /** Panels that have nothing to show, and say so in words. */
  empty: string[];
  errors: string[];
}

export const report: Report = { panels: 0, drawn: 0, annotations: {}, empty: [], errors: [] };
(window as any).memtraceReport = report;

export function wrong(text: string): void {
  report.errors.push(text.slice(0, 600));
}

window.addEventListener('error', (event) => wrong(`page: ${event.message}`));
window.addEventListener('unhandledrejection', (event) => wrong(`page: ${event.reason}`));
const consoleError = console.error;
console.error = (...words: unknown[]) => {
  wrong(`console: ${words.map(String).join(' ')}`);
  consoleError(...words);
};
