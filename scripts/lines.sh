#!/usr/bin/env bash
# Source lines per folder: files, lines, of these code (neither blank nor comment alone), and the
# longest file.
set -euo pipefail
cd "$(dirname "$0")/.."
printf '%-10s %6s %7s %7s   %s\n' folder files lines code 'longest file'
for folder in tensor autograd nn quant models cuda tools total tests; do
  case $folder in
    total) folders="tensor autograd nn quant models cuda tools" ;;
    *) folders=$folder ;;
  esac
  # shellcheck disable=SC2086
  find $folders -regex '.*\.\(h\|cpp\|cu\|cuh\|def\)' \
    -exec awk '
      FNR == 1 { file = FILENAME; print "F" }
      { code = ($0 !~ /^[ \t]*$/ && $0 !~ /^[ \t]*\/\//); print "L", code, FNR, file }
    ' {} + 2>/dev/null |
    awk -v folder="$folder" '
      $1 == "F" { files++ }
      $1 == "L" { lines++; code += $2; if ($3 > longest) { longest = $3; name = $4 } }
      END {
        where = longest ? longest " " name : "-"
        printf "%-10s %6d %7d %7d   %s\n", folder, files, lines, code, where
      }'
done
