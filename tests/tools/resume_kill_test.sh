#!/usr/bin/env bash
# kill -9 at random moments of a calibration, each run resumed: the same bytes as an unbroken run,
# and the same report but for times and memory.
#
#   resume_kill_test.sh BIN_DIR [KILLS] [omq-quant options…]
#
# Every kill is a run of its own in a fresh --work folder; every third is killed a second time on
# its way. The moments are spread evenly over the time that the unbroken run took, with a random
# shift (SEED=n repeats them).
set -euo pipefail
bin=$1 kills=${2:-2}
shift $(($# < 2 ? $# : 2))
cd "$(dirname "$0")/../.."
model=tests/fixtures/tiny-llama
[ -f "$model/model.safetensors" ] || { echo "MESSAGE: skipped: no $model"; exit 0; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
RANDOM=${SEED:-$$}
options=(--wbits 3 --group-size 64 --epochs 8)
[ $# -eq 0 ] || options=("$@")
quant() {  # quant OUT [options…], in a subshell that becomes the program: a kill must reach it
  exec "$bin/omq-quant" -m "$model" -o "$dir/$1" --force --calib "$model/calib.txt" --nsamples 4 \
    --seqlen 32 "${options[@]}" "${@:2}" >>"$dir/log" 2>&1
}
lasting() { grep -vE '"(seconds|calibration_seconds|peak_[a-z_]*bytes)"' "$1/report.json"; }
now() { date +%s%N; }

start=$(now)
(quant whole --work "$dir/work-whole") || { cat "$dir/log"; exit 1; }
took=$((($(now) - start) / 1000000))
lasting "$dir/whole" >"$dir/whole.json"
late=0
for ((i = 0; i < kills; ++i)); do
  rm -rf "$dir/work" "$dir/out"
  again=$((i % 3 == 2 ? 2 : 1))
  for ((k = 0; k < again; ++k)); do
    ms=$(((took * (2 * i + 1) / (2 * kills) + RANDOM % (took / kills + 1)) / again + 1))
    quant out --work "$dir/work" &
    pid=$!
    sleep "$(printf '%d.%03d' $((ms / 1000)) $((ms % 1000)))"
    kill -9 $pid 2>/dev/null || late=$((late + 1))
    wait $pid 2>/dev/null || true
  done
  mkdir -p "$dir/work"  # a very early kill leaves none
  blocks=$(find "$dir/work" -name 'block-*.safetensors' | wc -l)
  (quant out --work "$dir/work") || { cat "$dir/log"; exit 1; }
  cmp "$dir/whole/model.safetensors" "$dir/out/model.safetensors"
  lasting "$dir/out" | cmp "$dir/whole.json" -
  for f in config.json tokenizer.json; do cmp "$dir/whole/$f" "$dir/out/$f"; done
  echo "kill $((i + 1)) of $kills after $ms ms, $blocks blocks finished: resumed, the same bytes"
done
left=$(find "$dir" -maxdepth 1 -name '*.partial-*' | wc -l)
[ "$left" -eq 0 ] || { echo "$left partial folders are left"; exit 1; }
echo "$kills kills of a run of $took ms ($late came too late): all the same bytes"
