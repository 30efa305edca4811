#!/usr/bin/env bash
# Installs the build tree to a scratch prefix and builds the project beside this file against it,
# once through its CMake package and once through pkg-config.
#
#   run.sh BUILD_DIR COMPILER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
build=$1 compiler=${2:-c++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake --install "$build" --prefix "$work/prefix" >"$work/log" || { cat "$work/log"; exit 1; }

echo "== CMake package"
cmake -S "$here" -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_PREFIX_PATH="$work/prefix" -DCMAKE_CXX_COMPILER="$compiler" >"$work/log" 2>&1 ||
  { cat "$work/log"; exit 1; }
cmake --build "$work/build" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$work/build/embed"

if ! command -v pkg-config >/dev/null; then
  echo "== pkg-config is not here: skipped"
  exit 0
fi
echo "== pkg-config"
pc=$(find "$work/prefix" -name omq.pc)
# The scratch prefix is not the one that was configured.
flags=$(PKG_CONFIG_PATH=$(dirname "$pc") \
  pkg-config --define-variable=prefix="$work/prefix" --cflags --libs omq)
read -r -a flags <<<"$flags"
"$compiler" -std=c++20 -O1 "$here/main.cpp" "${flags[@]}" -o "$work/embed"
"$work/embed"
