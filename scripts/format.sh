#!/usr/bin/env bash
# format.sh fix | check: clang-format over our sources. The check is skipped, visibly, where there
# is no clang-format.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
tool=$(command -v clang-format-14 || command -v clang-format) || {
  echo "omq: format ${1}: SKIPPED, no clang-format here (Debian: apt-get install clang-format)" >&2
  exit 0
}
# What git knows; all there is in a tree without git.
files() {
  if git rev-parse --git-dir >/dev/null 2>&1; then
    git ls-files -z -co --exclude-standard -- '*.h' '*.cpp' '*.cu' '*.cuh'
  else
    find . -path './build*' -prune -o -path './.cache' -prune -o \
      -regex '.*\.\(h\|cpp\|cu\|cuh\)' -printf '%P\0'
  fi | sort -z
}
case ${1:-} in
  fix) files | xargs -0 -r "$tool" -i ;;
  check)
    if ! files | xargs -0 -r "$tool" --dry-run --Werror >/dev/null 2>&1; then
      echo "omq: not formatted (run 'make format'):" >&2
      files | while IFS= read -r -d '' file; do
        "$tool" --dry-run --Werror "$file" >/dev/null 2>&1 || echo "  $file" >&2
      done
      exit 1
    fi
    version=$("$tool" --version | grep -oE '[0-9]+\.[0-9.]+' | head -1)
    echo "format: $(files | tr -cd '\0' | wc -c) files as clang-format $version wants them" ;;
  *) echo "usage: format.sh fix|check" >&2; exit 2 ;;
esac
