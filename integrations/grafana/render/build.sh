#!/usr/bin/env bash
# Builds the page that draws dashboards: integrations/grafana/render/build.sh DIRECTORY
#
# Sources are copied to the directory, Grafana's UI library is installed there (some 480 npm packages, no install
# scripts), and the bundle is left in DIRECTORY/bundle. Does nothing when that is newer than the sources.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=$1
mkdir -p "$target"
if [ -e "$target/bundle/index.html" ] && [ -z "$(find "$here" -newer "$target/bundle/index.html" -type f)" ]; then
    exit 0
fi
cp -R "$here"/. "$target"
cd "$target"
if ! cmp -s package-lock.json node_modules/.installed; then
    npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
    cp package-lock.json node_modules/.installed
fi
node build.mjs
