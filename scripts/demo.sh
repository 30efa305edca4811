#!/usr/bin/env bash
# The demo: quantise the bundled model to 3 and 2 bits, to nearest and with OmniQuant, compare,
# and let it write.
#
#   demo.sh [BIN_DIR]        default: build/bin
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:-build/bin}
model=tests/fixtures/tiny-llama
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
group=128 window=128 samples=64 epochs=20
rate=0.003  # a third of the paper's: the factors of so small a model do not settle at 0.01
loss=--no-token-loss  # the paper's: no token of so small a model is massive
start=$SECONDS

[ -d "$model" ] || { echo "demo: $model is missing from this tree" >&2; exit 1; }

ppl() {  # ppl MODEL → perplexity of the held-out text, four decimals
  "$bin/omq-run" ppl -m "$1" -f "$model/test.txt" -c $window --json 2>"$out/log" |
    sed -n 's/.*"perplexity": *\([0-9.eE+-]*\).*/\1/p' | awk '{ printf "%.4f", $1 }'
}
quant() {  # quant METHOD BITS → a folder
  local learning=()  # rtn refuses them: it would do nothing with them
  [ "$1" = rtn ] || learning=(--epochs $epochs --lwc-lr $rate $loss)
  "$bin/omq-quant" -m "$model" -o "$out/$1-w$2" --method "$1" --wbits "$2" --group-size $group \
    --calib "$model/calib.txt" --nsamples $samples --seqlen $window \
    "${learning[@]}" >"$out/log" 2>&1
}
run() { "$@" || { echo "demo: '$*' failed:" >&2; tail -n 20 "$out/log" >&2; exit 1; }; }

echo "A LLaMA of a megabyte, quantised to 3 and 2 bits in groups of $group"
echo "($samples calibration windows of $window tokens, $epochs epochs, rate $rate):"
for bits in 3 2; do
  for method in rtn omniquant; do
    echo "  omq-quant --method $method --wbits $bits …"
    run quant $method $bits
  done
done

size() { stat -c %s "$1/model.safetensors" | awk '{ printf "%.0f kB", $1 / 1e3 }'; }
full=$(run ppl "$model")
echo
echo "Perplexity of held-out text (lower is better; the model in 16 bits: $(size "$model")):"
printf '  %-6s %10s %10s %10s   %s\n' "" "full" "RTN" "OmniQuant" "packed"
for bits in 3 2; do
  rtn=$(run ppl "$out/rtn-w$bits") omniquant=$(run ppl "$out/omniquant-w$bits")
  printf '  %-6s %10s %10s %10s   %s\n' "W$bits" "$full" "$rtn" "$omniquant" \
    "$(size "$out/omniquant-w$bits")"
done

prompt=$(head -c 400 "$model/test.txt" | tr '\n' ' ' | cut -d. -f1 | cut -d' ' -f1-4)
echo
echo "Written by the packed 3-bit model (omq-run generate, greedy) after \"$prompt\":"
printf '  %s' "$prompt"
run "$bin/omq-run" generate -m "$out/omniquant-w3" -p "$prompt" -n 80 --temp 0 2>"$out/log"
echo
echo
echo "Demo done in $((SECONDS - start)) s."
