#!/usr/bin/env bash
# On a machine with a GPU, in a checkout of this tree with the two programs of `make test-gpu` in
# build-cuda/bin: runs the device tests, the kernel tests once more under compute-sanitizer where it
# starts (with OMQ_TEST_FEW=1: fewer steps of the long ones), and the kernel benchmark. Under six
# minutes.
#
#   test-gpu.sh [BIN_DIR]        default: build-cuda/bin
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:-build-cuda/bin}
export OMQ_SOURCE_DIR=$PWD
start=$SECONDS

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader

# cuBLASLt is the one shared library that is not everywhere; Python packages bring it along.
if ldd "$bin/omq-test-gpu" | grep -q 'not found'; then
  library=$(find /usr/local /usr/lib /opt -name 'libcublasLt.so.13' -print -quit 2>/dev/null || true)
  [ -n "$library" ] || { echo "test-gpu: no libcublasLt.so.13 here" >&2; exit 1; }
  export LD_LIBRARY_PATH=$(dirname "$library")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

echo "== tests"
timeout 200 "$bin/omq-test-gpu" --test-case-exclude='slow:*'

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null ||
  true)
check() {  # check TOOL
  local log status=0
  log=$(mktemp)
  echo "== compute-sanitizer $1 ($((SECONDS - start)) s so far)"
  OMQ_TEST_FEW=1 timeout 90 "$sanitizer" --tool "$1" --error-exitcode 9 "$bin/omq-test-gpu" \
    --test-case='devices:*' --test-case-exclude='*hundred times*,*memory is counted*' \
    >"$log" 2>&1 || status=$?
  tail -n 6 "$log"
  if [ "$status" = 124 ]; then
    echo "$1: out of time; no error up to there: $(grep -c 'Invalid\|Race reported' "$log" || true)"
  elif grep -qi 'device not supported\|unable to' "$log"; then
    echo "$1: SKIPPED, it does not start here"
  elif [ "$status" != 0 ]; then
    grep -m 40 -A 12 'Invalid\|Race reported\|ERROR' "$log" || true
    return 1
  fi
}
if [ -n "$sanitizer" ]; then
  check memcheck
  check racecheck
else
  echo "== compute-sanitizer: SKIPPED, not found"
fi

echo "== kernels ($((SECONDS - start)) s so far)"
timeout 100 "$bin/omq-bench-device" --device cuda
echo "== done in $((SECONDS - start)) s"
