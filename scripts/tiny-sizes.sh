#!/usr/bin/env bash
# What the tiny build weighs: the stripped static omq-run, what a C program takes from libomq.a, and
# the memory of that program on a mapped model. Fails where a limit is passed.
#
#   tiny-sizes.sh BUILD_DIR [MODEL]      MODEL: to be packed at W4 g64; default the real one if there
set -euo pipefail
cd "$(dirname "$0")/.."
build=$1
model=${2:-${OMQ_SMOLLM2:-.cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf}}
# Without streams, locales and time zones in omq-run: each would bring a few hundred KB of the C and
# C++ libraries with it (tools/plain stands in for CLI11, which is written with streams).
run_limit=2500000 library_limit=1500000 embed_limit=2500000
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# at_most WHAT BYTES LIMIT
at_most() {
  awk -v what="$1" -v n="$2" -v limit="$3" 'BEGIN {
    printf "%-58s %5.2f MB (limit %.2f)\n", what, n / 1e6, limit / 1e6; exit n > limit }' ||
    { echo "tiny: $1 is too large" >&2; exit 1; }
}

at_most "omq-run, static and stripped" "$(stat -c %s "$build/bin/omq-run")" $run_limit

"${CC:-cc}" -std=c99 -O2 -Iinclude examples/embed.c "$build/libomq.a" -lstdc++ -lm -pthread -static -s \
  -Wl,--gc-sections -Wl,-Map="$work/map" -o "$work/embed"
# Bytes that the linker took from libomq.a: code, constants, tables of exceptions, data.
taken=$(awk '
  function hex(s,  i, n) {
    for (i = 3; i <= length(s); ++i) n = 16 * n + index("0123456789abcdef", substr(s, i, 1)) - 1
    return n
  }
  /^Linker script and memory map/ { on = 1 }
  !on { next }
  # " .text.name  0x… 0x… file"; a long name stands on a line of its own.
  /libomq\.a\(/ && match($0, /0x[0-9a-f]+ +0x[0-9a-f]+ /) {
    split(substr($0, RSTART, RLENGTH), at, " ")
    section = $1 ~ /^\./ ? $1 : pending
    if (section !~ /^\.(debug|comment|note|bss|tbss|group)/ && hex(at[1]) > 0) total += hex(at[2])
  }
  { pending = NF == 1 && $1 ~ /^\./ ? $1 : "" }
  END { print total + 0 }' "$work/map")
at_most "libomq, what examples/embed.c links of it" "$taken" $library_limit
at_most "examples/embed.c, static and stripped, libc and libstdc++ in it" \
  "$(stat -c %s "$work/embed")" $embed_limit

if [ ! -e "$model" ]; then
  echo "memory on a mapped model: skipped, no $model (make smollm2)"
  exit 0
fi
"$build/bin/omq-quant" -m "$model" -o "$work/w4" --method rtn --wbits 4 --group-size 64 -q
echo "model.safetensors, W4 in groups of 64: $(($(stat -c %s "$work/w4/model.safetensors") / 1024)) kB"
"$work/embed" "$work/w4" "The capital of France is" 2>&1
