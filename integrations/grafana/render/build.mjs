// Bundles src/main.tsx and the page around it into bundle/. Runs in a copy of this directory that has node_modules.
import { copyFileSync, cpSync } from 'node:fs';
import { createRequire } from 'node:module';
import { build } from 'esbuild';

const scrollbars = createRequire(import.meta.url).resolve('react-custom-scrollbars-2');

await build({
  entryPoints: ['src/main.tsx'],
  bundle: true,
  minify: true,
  jsx: 'automatic',
  outfile: 'bundle/bundle.js',
  logLevel: 'error',
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  loader: Object.fromEntries(['.svg', '.png', '.woff2', '.ttf'].map((suffix) => [suffix, 'dataurl'])),
  // This package is CommonJS with a `default` of its own, which @grafana/ui's ES modules import as if it had none.
  plugins: [
    {
      name: 'scrollbars',
      setup(builder) {
        builder.onResolve({ filter: /^react-custom-scrollbars-2$/ }, () => ({ path: 'scrollbars', namespace: 'shim' }));
        builder.onLoad({ filter: /.*/, namespace: 'shim' }, () => ({
          resolveDir: import.meta.dirname,
          contents: `import found from ${JSON.stringify(scrollbars)};
            export const Scrollbars = found.Scrollbars ?? found.default ?? found;
            export default Scrollbars;`,
        }));
      },
    },
  ],
});
cpSync('node_modules/@grafana/ui/dist/public/img', 'bundle/public/build/img', { recursive: true });
copyFileSync('index.html', 'bundle/index.html');
