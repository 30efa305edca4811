#!/usr/bin/env bash
# Fails when an object compiled for one instruction set (packed_avx2.cpp, packed_avx2_codes.cpp, …)
# defines a weak function: the linker merges those across files, so another part of the program
# could end up running it.
#
#   isa_symbols.sh OBJECT...
set -euo pipefail
bad=0 seen=0
for object in "$@"; do
  [[ $object =~ packed_(avx2|avx512|amx|neon)(_[a-z]+)?\.cpp ]] || continue
  seen=$((seen + 1))
  if weak=$(nm -C --defined-only "$object" | awk '$2 == "W" || $2 == "V"') && [ -n "$weak" ]; then
    echo "$(basename "$object"): merged by the linker across instruction sets:"
    echo "$weak"
    bad=1
  fi
done
echo "$seen objects looked at"
exit $bad
