#!/usr/bin/env bash
# A CUDA machine's first minutes, which may be its only ones: build against the torch that is there, GPU tests, tables,
# compute-sanitizer. The steps that teach most come first; each has a share of the time that is left, so that all of
# them fit SECONDS; a hang, a crash or a lost context ends its own step only. Whatever happens, $OUT holds at most five
# files: summary.txt, logs.txt (all logs and failures), tables.md, tables.json and t1_gpu.json.
#
# Usage: PYTHON=python3 OUT=folder bash benches/gpu_first.sh [SECONDS] [first|second]
#   first   tests, a table for each family, one cell of T1, memcheck
#   second  tests again (TESTS="expression" for pytest -k picks some), NVRTC, tables of gram and proximal, racecheck,
#           T1 compiled, initcheck
#   SITE=folder  an installation made beforehand for this Python and torch: then the build is a check beside the tests
# Without a device everything is rehearsed on the CPU, to its end.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} LIMIT=${1:-320} RUN=${2:-first} OUT=${OUT:-build/gpu-first} START=$SECONDS
W=$(mktemp -d) SITE=$(realpath -m "${SITE:-.site}") WORKERS=${WORKERS:-$(($(nproc) > 12 ? 12 : $(nproc)))} STATUS=0
mkdir -p "$OUT" && rm -f "$OUT"/{summary.txt,logs.txt,tables.md,tables.json,t1_gpu.json}
export PYTHONUNBUFFERED=1 PATH="$PATH:/usr/local/cuda/bin" TRITON_CACHE_DIR="$W/triton" CFL_FAILURES="$W/9failures.log"
: >"$W/summary"
: >"$CFL_FAILURES"

pack() { # what there is so far, into $OUT; each file is complete at any moment
  local to
  to=$(mktemp -d "$W/packXXXX")
  for f in "$W"/*.log; do
    echo "##### $(basename "$f")"
    if (($(stat -c %s "$f") > 2000000)); then head -c 1000000 "$f"; echo; echo "[cut]"; tail -c 1000000 "$f"; else cat "$f"; fi
    echo
  done >"$to/logs.txt"
  cp "$W/summary" "$to/summary.txt"
  cat "$W"/table-*/*.md >"$to/tables.md" 2>/dev/null
  { echo '{"tables": ['; separator=""
    for f in "$W"/table-*/*.json; do [ -s "$f" ] && { echo "$separator"; cat "$f"; separator=","; }; done
    echo ']}'; } >"$to/tables.json"
  cp "$W"/t1/t1_gpu.json "$to"/ 2>/dev/null
  mv -f "$to"/* "$OUT"/ && rmdir "$to"
}
trap 'pack; exit 143' TERM INT
# Also while a step runs: a machine may be taken back at any time.
(trap - TERM INT; while sleep 10; do pack; done) >/dev/null 2>&1 &
PACKER=$!

# The plan: a step, and its share of the time.
declare -A SHARE
if [ "$RUN" = first ]; then
  ORDER=(machine build config tests capture table-solve table-solve_small table-codec table-gram table-proximal t1
    memcheck tests-python)
  SHARE=([machine]=6 [build]=140 [config]=10 [tests]=70 [capture]=26 [table-solve]=20 [table-solve_small]=20
    [table-codec]=16 [table-gram]=28 [table-proximal]=18 [t1]=14 [memcheck]=30 [tests-python]=10)
else
  ORDER=(machine build config tests tests-nvrtc table-gram table-proximal racecheck t1 tests-python initcheck)
  SHARE=([machine]=6 [build]=140 [config]=10 [tests]=50 [tests-nvrtc]=45 [table-gram]=30 [table-proximal]=22
    [racecheck]=35 [t1]=40 [tests-python]=15 [initcheck]=30)
fi
left() { echo $((LIMIT - (SECONDS - START))); }
share() { # NAME: the seconds of a step, of what is left for it and all that follow
  local sum=0 on=0 name
  for name in "${ORDER[@]}"; do
    [ "$name" = "$1" ] && on=1
    ((on)) && sum=$((sum + SHARE[$name]))
  done
  sum=$(($(left) * SHARE[$1] / sum))
  ((sum < 10)) && sum=10
  echo $((sum < $(left) ? sum : $(left)))
}
say() { echo "$1: $2, $3 s, at $((SECONDS - START)) s of $LIMIT" | tee -a "$W/summary"; }
limited() { # SECONDS COMMAND...: SIGINT to all of it, so that Python says what it has; five seconds later SIGKILL
  local limit=$1 pid watch rc=0
  shift
  # (timeout would send SIGINT twice to its child, and the second ends what the first began.)
  setsid env --default-signal=INT "$@" & # background jobs ignore SIGINT otherwise
  pid=$!
  rm -f "$W/cut"
  (trap 'kill $!; exit' TERM
   sleep "$limit" & wait $!
   : >"$W/cut"
   kill -INT -- -$pid
   sleep 5 & wait $!
   kill -KILL -- -$pid) >/dev/null 2>&1 &
  watch=$!
  wait $pid || rc=$?
  { kill $watch; wait $watch; kill -KILL -- -$pid; } 2>/dev/null # also what it left running
  return $rc
}
step() { # NAME COMMAND...
  local name=$1 limit began=$SECONDS rc=0 verdict=ok
  limit=$(share "$1"); shift
  if ((limit < 6)); then say "$name" "NOT RUN (out of time)" 0; STATUS=1; return 1; fi
  ((limit > 25)) && limit=$((limit - 5))
  limited "$limit" "$@" >"$W/$name.log" 2>&1 || rc=$?
  if [ -e "$W/cut" ]; then verdict="CUT after $limit s ($rc)"; STATUS=1
  elif ((rc == 5)); then verdict="nothing to run"
  elif ((rc)); then verdict="FAILED ($rc)"; STATUS=1; fi
  say "$name" "$verdict" $((SECONDS - began))
  tail -n 4 "$W/$name.log" | cut -c1-300
  pack
  return "$rc"
}

machine() {
  nvidia-smi; nvcc --version; g++ --version | head -1; lscpu | grep -E "Model name|^CPU\(s\)"; free -g | head -2
  "$PYTHON" --version
  "$PYTHON" -m pip list 2>/dev/null | grep -iE "^(torch|triton|cupy|numpy|pytest|cmake|ninja|pybind11|scikit-build|quack|nvidia-nvcomp)"
  true
}
export -f machine
export PYTHON
step machine bash -c machine
DEVICE=cuda
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || DEVICE=cpu
if [ $DEVICE = cpu ]; then
  echo "no CUDA device: a rehearsal" | tee -a "$W/summary"
  export CFL_GPU_TESTS=rehearse TABLE_ARGS="--device cpu --small" T1_ARGS="--device cpu --width 8 --cells 16x64"
else
  export TABLE_ARGS="" T1_ARGS="--cells 128x512"
fi

BUILD=("$PYTHON" -m pip install -q --no-build-isolation --no-deps --no-index --upgrade)
BUILD+=("-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=${ARCH:-90}")
LOADS='import torch, cfl_ops; assert cfl_ops._library.extension_available(), "no extension"
assert torch.version.cuda is None or cfl_ops._cuda.native_available(), "the extension has no CUDA kernels"
cfl_ops.config.show()'
CHECK=""
if [ -d "$SITE" ] && PYTHONPATH=$SITE "$PYTHON" -c "$LOADS" >"$W/site.log" 2>&1; then
  SHARE[build]=1
  if [ $DEVICE = cuda ]; then
    (nice -n 15 timeout 240 "${BUILD[@]}" --target "$W/site" . >"$W/build.log" 2>&1
     say build "rc $? (a check beside the tests)" $((SECONDS - START))) &
    CHECK=$!
  fi
else
  SITE=$W/site
  step build "${BUILD[@]}" --target "$SITE" .
fi
export PYTHONPATH=$SITE
if ! step config "$PYTHON" -c "$LOADS"; then
  echo "without its extension nothing else is worth the time" | tee -a "$W/summary"
  kill $PACKER; wait $PACKER 2>/dev/null; pack; cat "$W/summary"; exit 1
fi

NVRTC=()
if [ "$RUN" = second ] && [ $DEVICE = cuda ]; then # CuPy keeps what it compiles: its tests find it
  for family in codec exact solve cholesky; do
    nice "$PYTHON" -c "import cfl_ops; cfl_ops._cuda.kernels('nvrtc').module('$family').compile()" \
      >"$W/nvrtc-$family.log" 2>&1 &
    NVRTC+=($!)
  done
fi
T=("$PYTHON" -m pytest tests/test_gpu.py tests/test_arrays.py -m gpu -q -rfE --tb=short -p no:cacheprovider)
T+=(-W default::DeprecationWarning) # of a Python that is newer than the one these tests were written on
T+=(--timeout 45 --timeout-method=thread --max-worker-restart 60 -n "$WORKERS")
APART="captured or compiled"
export OMP_NUM_THREADS=1
step tests "${T[@]}" -k "(${TESTS:-gpu}) and not nvrtc and not python and not ($APART)"
# By themselves: a capture that fails leaves its process odd.
[ "$RUN" = first ] && step capture "${T[@]}" --timeout 100 -n $((WORKERS > 6 ? 6 : WORKERS)) -k "$APART"
if [ "$RUN" = second ]; then
  ((${#NVRTC[@]})) && wait "${NVRTC[@]}"
  step tests-nvrtc "${T[@]}" -k "nvrtc and not ($APART)"
fi
unset OMP_NUM_THREADS
[ -n "$CHECK" ] && wait "$CHECK" # timings want a quiet machine

CEILINGS=""
table() { # FAMILY: one process each, so that a sticky error costs one family
  local seconds
  seconds=$(share "table-$1")
  # shellcheck disable=SC2086
  step "table-$1" "$PYTHON" benches/gpu_table.py --family "$1" --out "$W/table-$1" --seconds $((seconds > 12 ? seconds - 8 : 4)) \
    $TABLE_ARGS $CEILINGS
  [ -z "$CEILINGS" ] && [ -s "$W/table-$1/gpu_table.json" ] && CEILINGS="--ceilings $W/table-$1/gpu_table.json"
}
t1() {
  local seconds
  seconds=$(share t1)
  # shellcheck disable=SC2086
  step t1 "$PYTHON" benches/paper/t1_gpu.py --out "$W/t1" --seconds $((seconds > 12 ? seconds - 8 : 4)) $T1_ARGS "$@"
}
OURS=()
for kernel in cfl $(grep -hoE "def _\w+_kernel" triton_kernels/*.py | cut -c5- | sort -u); do OURS+=(--kernel-name "kns=$kernel"); done
sanitize() { # NAME OPTIONS...: our own kernels, each allocation by itself so that its end is seen
  local name=$1
  shift
  if ! command -v compute-sanitizer >/dev/null; then
    if [ $DEVICE = cpu ]; then step "$name" "$PYTHON" benches/gpu_small_run.py --device cpu
    else say "$name" "NOT RUN (no compute-sanitizer)" 0; STATUS=1; fi
    return
  fi
  step "$name" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$name" --target-processes application-only \
    --report-api-errors no --error-exitcode 9 "$@" "$PYTHON" benches/gpu_small_run.py
}
if [ "$RUN" = first ]; then
  for family in solve solve_small codec gram proximal; do table $family; done
  t1 --eager --repeats 10 --networks resnet18
  sanitize memcheck --padding 64 "${OURS[@]}"
else
  table gram
  table proximal
  sanitize racecheck --kernel-name kns=solve --kernel-name kns=cholesky
  t1 --repeats 10 --networks resnet18
fi
export OMP_NUM_THREADS=1
step tests-python "${T[@]}" -k "python and not ($APART)" # torch's own ops on this card: what the fallback stands on
unset OMP_NUM_THREADS
[ "$RUN" = second ] && sanitize initcheck "${OURS[@]}"

kill $PACKER
wait $PACKER 2>/dev/null
echo "$(grep -c '^===' "$CFL_FAILURES") failures logged" | tee -a "$W/summary"
pack
echo "-----"
cat "$W/summary"
rm -rf "$W"
exit $STATUS
