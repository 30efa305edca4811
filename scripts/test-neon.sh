#!/usr/bin/env bash
# The NEON kernels on a machine that is no ARM: cross-builds for AArch64 into build-neon, runs the
# tensor tests under qemu-user, and compares what the bundled model scores and writes on NEON and on
# the plain loops. Skipped, visibly, where there is no cross compiler or no qemu; on an ARM `make
# test` runs the same tests as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { echo "test-neon: $*" >&2; }

case $(uname -m) in aarch64 | arm64)
  say "SKIPPED, this is an ARM: make test runs its kernels"
  exit 0 ;;
esac
scripts/install-packages.sh build neon
for program in aarch64-linux-gnu-g++ qemu-aarch64; do
  if ! command -v "$program" >/dev/null; then
    say "SKIPPED, no $program here (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)"
    exit 0
  fi
done

build="build-neon"
scripts/configure.sh neon
cmake --build $build --parallel "${JOBS:-$(nproc)}" --target omq-test-tensor omq-run omq-quant

# Neoverse N1 is ARMv8.2-A with the dot product; Cortex-A72 has none.
emulate() { qemu-aarch64 -cpu "$@"; }
kernels() { grep -o 'packed kernels [a-z0-9]*' | cut -d' ' -f3; }
for pair in neoverse-n1:neon cortex-a72:scalar; do
  found=$(emulate "${pair%:*}" $build/bin/omq-run --version | kernels || true)
  if [ "$found" != "${pair#*:}" ]; then
    say "a ${pair%:*} takes the kernels '$found', expected '${pair#*:}'"
    exit 1
  fi
done

OMQ_ISA=neon scripts/run-tests.sh $build -R '^(tensor|isa_symbols)$'

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
model=tests/fixtures/tiny-llama
run() { emulate neoverse-n1 "$build/bin/$1" "${@:2}"; }
for spec in w4a16 w3a16 w8a8; do
  packed=$work/$spec wbits=${spec:1:1}
  run omq-quant -q -m $model -o "$packed" --method rtn --wbits "$wbits" --abits "${spec#*a}" \
    --group-size 64 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
  for isa in scalar neon; do
    run omq-run ppl -q -m "$packed" -f $model/test.txt -c 64 --chunks 1 --isa $isa --json \
      >"$work/$isa.json"
    run omq-run generate -q -m "$packed" -p 'Once there was a' -n 64 --temp 0 --isa $isa \
      >"$work/$isa.txt"
  done
  loss() { sed -n 's/^ *"mean_nll": *\([0-9.e+-]*\).*/\1/p' "$work/$1.json"; }
  awk -v spec=$spec -v neon="$(loss neon)" -v scalar="$(loss scalar)" 'BEGIN {
    apart = scalar > 0 ? (neon - scalar) / scalar : 1
    if (apart < 0) apart = -apart
    printf "64 tokens of the bundled model, %s: neon %.7f, scalar %.7f nats a token, %.1e apart\n",
      spec, neon, scalar, apart
    exit !(apart < 1e-4) }' || { say "the losses of $spec are more than 1e-4 apart"; exit 1; }
  cmp "$work/neon.txt" "$work/scalar.txt" ||
    { say "64 tokens written by $spec differ"; exit 1; }
done
echo "64 tokens written on NEON are those of the plain loops, every time"
