#!/usr/bin/env bash
# The steps of `make ci`, each with its time. The sanitizer run comes last: its ctest summary is
# the last thing said.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export CCACHE_MAXSIZE=${CCACHE_MAXSIZE:-2G}
total=$SECONDS
for step in format-check test embed tiny cuda-check asan; do
  echo "==== ci: $step ($((SECONDS - total)) s so far)"
  if ! make --no-print-directory "$step"; then
    echo "==== ci: $step FAILED after $((SECONDS - total)) s" >&2
    exit 1
  fi
done
