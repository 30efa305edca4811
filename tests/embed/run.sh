#!/usr/bin/env bash
# Installs the build tree to a scratch prefix and builds outside projects against it: the C++ program
# beside this file and examples/embed.c, each once through the CMake package and once through
# pkg-config. Then the C program writes, and meets files that are no models.
#
#   run.sh BUILD_DIR C++_COMPILER [C_COMPILER]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
build=$1 compiler=${2:-c++} cc=${3:-cc}
model=$root/tests/fixtures/tiny-llama
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# quiet COMMAND…: its output only when it fails.
quiet() { "$@" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }
# same NAME WANTED GOT
same() { [ "$2" = "$3" ] || { echo "embed: $1: wanted $2, got $3" >&2; exit 1; }; }

# Through DESTDIR, as packages are made: what is built in must not name it.
quiet env DESTDIR="$work/stage" cmake --install "$build" --prefix /opt/omq
prefix=$work/prefix
mv "$work/stage/opt/omq" "$prefix"
if grep -rl "$work" "$prefix/lib"*; then echo "embed: installed files name the staging folder" >&2; exit 1; fi

echo "== C++, CMake package"
quiet cmake -S "$here" -B "$work/cxx" -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$prefix" \
  -DCMAKE_CXX_COMPILER="$compiler"
quiet cmake --build "$work/cxx"
"$work/cxx/embed"

echo "== C99, CMake package"
quiet cmake -S "$here/c" -B "$work/c" -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$prefix" \
  -DCMAKE_C_COMPILER="$cc" -DEXAMPLE="$root/examples/embed.c"
quiet cmake --build "$work/c"
"$work/c/embed" "$model" "Ella was a cheerful girl." 2>"$work/stderr" >"$work/text"
cat "$work/text" "$work/stderr"

if command -v pkg-config >/dev/null; then
  pc=$(find "$prefix" -name omq.pc)
  flags=$(PKG_CONFIG_PATH=$(dirname "$pc") pkg-config --cflags --libs omq)
  read -r -a flags <<<"$flags"
  echo "== C++, pkg-config"
  "$compiler" -std=c++20 -O1 "$here/main.cpp" "${flags[@]}" -o "$work/embed"
  "$work/embed"
  echo "== C99, pkg-config"
  "$cc" -std=c99 -Wall -Wextra -Wpedantic -Werror "$root/examples/embed.c" "${flags[@]}" \
    -o "$work/embed-c"
  same "pkg-config's program" "$(cat "$work/text")" \
    "$("$work/embed-c" "$model" "Ella was a cheerful girl." 2 2>/dev/null)"
else
  echo "== pkg-config is not here: skipped"
fi

echo "== what is no model"
status=0
said=$("$work/c/embed" /nowhere 2>&1 >/dev/null) || status=$?
same "a missing file" 1 "$status"
same "a missing file" "embed: status 2: /nowhere: no such file or folder" "$said"
head -c 1000 "$model/model.safetensors" >"$work/cut.safetensors"
status=0
said=$("$work/c/embed" "$work/cut.safetensors" 2>&1 >/dev/null) || status=$?
same "a file cut short" 1 "$status"
case $said in
  "embed: status 3: while reading $work/cut.safetensors: "*) echo "$said" | sed "s|$work/||" ;;
  *) echo "embed: a file cut short: $said" >&2; exit 1 ;;
esac
