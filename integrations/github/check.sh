#!/usr/bin/env bash
# What action.yml runs: memtrace check, with annotations in the log and the table in the summary of the job.
set -euo pipefail

if [[ -n "${MEMTRACE_INSTALL:-}" ]]; then
  read -ra packages <<< "$MEMTRACE_INSTALL"
  python -m pip install --quiet "${packages[@]}"
fi

options=()
[[ -z "${MEMTRACE_FILE:-}" ]] || options+=(--file "$MEMTRACE_FILE")
[[ -z "${MEMTRACE_BASELINE:-}" ]] || options+=(--baseline "$MEMTRACE_BASELINE")
read -ra cases <<< "${MEMTRACE_CASES:-}"
for name in "${cases[@]}"; do options+=(--case "$name"); done

reports=$(mktemp -d "${RUNNER_TEMP:-/tmp}/memtrace-check.XXXXXX")
status=0
python -m memtrace check "${options[@]}" --format github --format "markdown=$reports/report.md" \
  --format "junit=$reports/report.xml" || status=$?

if [[ -f "$reports/report.md" ]]; then
  cat "$reports/report.md" >> "$GITHUB_STEP_SUMMARY"
else
  echo "::error title=memtrace check::It ended with status $status before there was a report; its log says why."
fi
{
  echo "status=$status"
  echo "markdown=$reports/report.md"
  echo "junit=$reports/report.xml"
} >> "$GITHUB_OUTPUT"
exit "$status"
