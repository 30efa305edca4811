#!/usr/bin/env bash
# Runs one line of every method, and some compositions, on SmolLM2 and writes docs/methods.md.
#
#   methods.sh BIN_DIR CALIB_IDS TEXT [omq-quant options, such as --device cuda]
#
# CALIB_IDS: windows of token ids (omq-quant --calib-ids). TEXT: perplexity is taken over its first
# 20 windows of 2048 tokens.
set -euo pipefail
bin=$1 ids=$2 text=$3
shift 3
model=.cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
[ -f "$model" ] || { echo "methods: no $model (make smollm2)" >&2; exit 1; }
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
page=docs/methods.md

field() { sed -n "s/^ *\"$2\": *\"\{0,1\}\([^\",]*\).*/\1/p" "$1" | head -1; }

row() {  # what must be beaten, options
  local beat=$1 report=$out/m/report.json ppl seconds
  shift
  echo "methods: $*" >&2
  rm -rf "$out/m"
  ppl=$("$bin/omq-quant" -q -m "$model" -o "$out/m" --calib-ids "$ids" --keep lm_head=f16 \
    --eval "sim:$text" --eval-chunks 20 "${device[@]}" "$@" | sed -n 's/^simulated perplexity \([0-9.]*\).*/\1/p')
  seconds=$(field "$report" calibration_seconds)
  printf '| `%s` | %.2f | %.1f | %.2f | %.2f | %s |\n' "$*" "$(field "$report" block_bits_per_weight)" \
    "$ppl" "$(awk "BEGIN { print $seconds / 60 }")" \
    "$(awk "BEGIN { print $(field "$report" peak_memory_bytes) / 2^30 }")" "$beat"
}

device=("$@")
{
  echo '# Methods on one model'
  echo
  echo 'Written by `make methods`: SmolLM2-135M-Instruct, perplexity of the first 20 windows of 2048 tokens of the text, simulated;'
  echo 'true bits of a weight in the blocks, minutes of calibration, peak memory of the process in GiB.'
  echo
  echo '| line | bits | perplexity | minutes | GiB | to beat |'
  echo '|---|---|---|---|---|---|'
  row 'official OmniQuant 217.0' --method omniquant --wbits 2 --group-size 64 --epochs 20 --no-aug-loss
  row 4000 --method gptq --wbits 2 --group-size 64
  row 'gptq' --method omniquant --round gptq --wbits 2 --group-size 64 --epochs 20 --no-aug-loss
  row 'gptq' --method norm-tweaking --wbits 2 --group-size 64
  row 90 --method efficientqat --wbits 2 --group-size 64
  row 'official OmniQuant 32.53' --method omniquant --wbits 3 --group-size 64 --no-aug-loss
  row 55 --method gptq --wbits 3 --group-size 64
  row 'omniquant' --method efficientqat --wbits 3 --group-size 64
  row '' --method signround --wbits 3 --group-size 64
  row 110 --method quarot --wbits 4 --abits 4
  row 'quarot' --method quarot --rotate norms --wbits 4 --abits 4
  row 'quarot' --method quarot --rotate norms --clip lwc --train clip --wbits 4 --abits 4
  row 'quarot' --method quarot --rotate norms --round gptq --wbits 4 --abits 4
  row 'quarot' --method quarot --round gptq --wbits 4 --abits 4
  row 'quarot' --method quarot --clip lwc --train clip --wbits 4 --abits 4
  row 'quarot' --method flatquant --wbits 4 --abits 4
  row 'official OmniQuant 25.09' --method quarot --wbits 6 --abits 6
  row 'quarot' --method flatquant --wbits 6 --abits 6
} >"$out/page"
mv "$out/page" "$page"
echo "methods: $page" >&2
