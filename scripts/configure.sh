#!/usr/bin/env bash
# cmake --preset NAME, with Ninja where it is found and the build tree is new.
#
#   [OMQ_BUILD=DIR] configure.sh PRESET [cmake options]      DIR instead of the preset's folder
set -euo pipefail
cd "$(dirname "$0")/.."
preset=$1
shift
build=build
[ "$preset" = cpu ] || build=build-$preset
build=${OMQ_BUILD:-$build}
generator=()
if [ ! -f "$build/CMakeCache.txt" ] && command -v ninja >/dev/null; then generator=(-G Ninja); fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! cmake --preset "$preset" -B "$build" "${generator[@]}" "$@" >"$log" 2>&1; then
  cat "$log" >&2
  exit 1
fi
sed -n 's/^-- \(omq .*\)/\1/p; s/^-- \(  .*\)/\1/p; /CMake Warning/,/^$/p' "$log" >&2
