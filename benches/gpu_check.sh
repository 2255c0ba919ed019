#!/usr/bin/env bash
# On a CUDA machine, which may have no network: build cfl_ops from source against the torch that is
# installed there (2.11 or newer), run the GPU tests, compute-sanitizer on a small run and the GPU benches,
# and leave one table in $OUT. Every step runs even if an earlier one failed; the exit status tells.
# Usage: PYTHON=python3 OUT=folder bash benches/gpu_check.sh
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/gpu-check}
LIMIT=${LIMIT:-540} # seconds in all: 9 minutes at most
mkdir -p "$OUT"
SITE=$(mktemp -d)
START=$SECONDS
SUMMARY="$OUT/summary.md"
STATUS=0

left() { echo $((LIMIT - (SECONDS - START))); }

# step NAME SECONDS COMMAND...: run it under a limit, log it, and add a line to the summary.
step() {
  local name=$1 limit=$2 began=$SECONDS rc=0
  shift 2
  (( limit > $(left) )) && limit=$(left)
  if (( limit <= 5 )); then
    echo "| $name | not run: out of time | |" >>"$SUMMARY"
    STATUS=1
    return
  fi
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1 || rc=$?
  local verdict="ok"
  if (( rc == 5 )); then verdict="nothing to run"; elif (( rc != 0 )); then verdict="FAILED ($rc)"; STATUS=1; fi
  echo "| $name | $verdict | $((SECONDS - began)) s |" >>"$SUMMARY"
  echo "== $name: $verdict"
  tail -n 12 "$OUT/$name.log"
}

"$PYTHON" - >"$OUT/machine.txt" <<'PY'
import torch
print("torch", torch.__version__, "cuda", torch.version.cuda)
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(p.name, f"sm_{p.major}{p.minor}", f"{p.multi_processor_count} multiprocessors", f"{p.total_memory >> 20} MiB")
else:
    print("no CUDA device")
PY
cat "$OUT/machine.txt"
{
  echo "# gpu-check, $(date -u +%Y-%m-%d)"
  echo
  sed 's/^/    /' "$OUT/machine.txt"
  echo
  echo "| step | result | time |"
  echo "| --- | --- | --- |"
} >"$SUMMARY"

ARCH=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "90")')
step build 240 "$PYTHON" -m pip install -q --no-build-isolation --no-deps --no-index --upgrade --target "$SITE" \
  -Ccmake.define.CMAKE_CUDA_ARCHITECTURES="$ARCH" .
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
step config 60 "$PYTHON" -c 'import cfl_ops; cfl_ops.config.show()'
# What was never seen comes first: a run that is cut off still has the figures.
step table 150 "$PYTHON" benches/gpu_table.py --out "$OUT" --seconds 130
step tests 160 "$PYTHON" -m pytest tests -q -m gpu --timeout 120 -p no:cacheprovider
# The same kernels as CuPy compiles them, where it is installed.
if "$PYTHON" -c 'import cupy' 2>/dev/null; then
  step nvrtc 60 env CFL_OPS_BACKEND=nvrtc "$PYTHON" -m pytest tests/test_gpu.py -q -k "nvrtc" -p no:cacheprovider
else
  echo "| nvrtc | cupy is not installed | |" >>"$SUMMARY"
fi

step t1 120 "$PYTHON" benches/paper/t1_gpu.py --out "$OUT" --seconds 60 --cells 128x512,128x2048
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    step "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benches/gpu_small_run.py
  done
else
  echo "| sanitizer | compute-sanitizer is not installed | |" >>"$SUMMARY"
fi

cat "$SUMMARY"
rm -rf "$SITE"
exit $STATUS
