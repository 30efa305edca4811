#!/usr/bin/env bash
# ctest, ending in its own summary; just before that, what tests left out for want of data
# ("skipped: …").
#
#   run-tests.sh BUILD_DIR [ctest options]
set -uo pipefail
build=$1
shift
if [ ! -f "$build/CTestTestfile.cmake" ]; then
  echo "omq: $build has no tests; configure it with OMQ_TESTS=ON" >&2
  exit 1
fi
held=$(mktemp)
trap 'rm -f "$held"' EXIT
# Everything is shown as it comes, but the lines from the summary on are held back.
ctest --test-dir "$build" --output-on-failure --no-tests=error -j "${JOBS:-$(nproc)}" "$@" 2>&1 |
  awk -v held="$held" '
    /^[0-9]+% tests passed/ { hold = 1 }
    { if (hold) print > held; else { print; fflush() } }'
status=${PIPESTATUS[0]}
log=$build/Testing/Temporary/LastTest.log
if [ -f "$log" ] && grep -qiE 'MESSAGE: .*skip' "$log"; then
  echo "Left out:"
  grep -iE 'MESSAGE: .*skip' "$log" | sed -E 's/^.*MESSAGE: */  /' | sort | uniq -c | sort -rn
  echo
fi
cat "$held"
exit "$status"
