#!/usr/bin/env bash
# A CUDA machine's first minutes, which may be its only ones: build against the torch that is there, GPU tests, tables,
# compute-sanitizer. The steps that teach most come first; each has a share of the time that is left, so that they fit
# SECONDS. Every step is a session of its own: a hang, a crash or a lost context ends that step and no other, and
# nothing of it outlives the script, however that ends. $OUT holds five files, brought up to date after each step and
# every ten seconds: summary.txt, logs.txt (all logs, failures, and what ran when a step was cut), tables.md,
# tables.json and t1_gpu.json.
#
# Usage: PYTHON=python3 OUT=folder bash benches/gpu_first.sh [SECONDS] [first|second]
#   first   tests, a table for each family, one cell of T1, memcheck
#   second  tests again, profiles, NVRTC, tables of gram and proximal, racecheck, T1 compiled, initcheck
#   TESTS="expression"  for pytest -k: which tests, of those by name and of those that capture or compile
#   BUILD=no            use the cfl_ops that can be imported, if its sources are this tree's
# Without a device everything is rehearsed on the CPU, to its end.
set -uo pipefail
cd "$(dirname "$0")/.."
LIMIT=${1:-320} RUN=${2:-first} START=$SECONDS STATUS=0
OUT=$(realpath -m "${OUT:-build/gpu-first}") W=$(mktemp -d)
export PYTHON=${PYTHON:-python3} OUT W MAIN=$$
WORKERS=${WORKERS:-$(($(nproc) > 12 ? 12 : $(nproc)))}
mkdir -p "$OUT" && rm -f "$OUT"/{summary.txt,logs.txt,tables.md,tables.json,t1_gpu.json}
export PYTHONUNBUFFERED=1 PATH="$PATH:/usr/local/cuda/bin" TRITON_CACHE_DIR="$W/triton" CFL_FAILURES="$W/9failures.log"
: >"$W/summary.txt"
: >"$W/groups"
: >"$CFL_FAILURES"

# What comes back

put() { # NAME: a file of $OUT from the input, whole or as it was
  cat >"$OUT/.new" && mv -f "$OUT/.new" "$OUT/$1"
}
pack() { # what there is so far; what outgrows 16 MiB would not come back
  (
    flock 9
    put summary.txt <"$W/summary.txt"
    for f in "$W"/*.log; do
      echo "##### $(basename "$f")"
      if (($(stat -c %s "$f") > 400000)); then
        head -c 200000 "$f"
        printf '\n[cut]\n'
        tail -c 200000 "$f"
      else
        cat "$f"
      fi
      echo
    done | head -c 12000000 | put logs.txt
    cat "$W"/table-*/*.md 2>/dev/null | head -c 12000000 | put tables.md
    "$PYTHON" -c '
import json, pathlib, sys
tables = [json.loads(path.read_text()) for path in sorted(pathlib.Path(sys.argv[1]).glob("table-*/*.json"))]
print(json.dumps({"tables": tables}, indent=1))' "$W" | put tables.json
    [ -s "$W/t1/t1_gpu.json" ] && put t1_gpu.json <"$W/t1/t1_gpu.json"
  ) 9>"$W/lock"
}
clear_up() { # kill what was started
  local group
  while read -r group; do kill -KILL -- "-$group"; done <"$W/groups" 2>/dev/null
}
guard() { # in a session of its own, so that it outlives a script that is killed, by seconds
  local n=0
  while kill -0 "$MAIN" 2>/dev/null; do
    sleep 1
    ((++n % 10)) || pack
  done
  clear_up
  pack
  rm -rf "$W"
}
export -f put pack clear_up guard
setsid bash -c guard >/dev/null 2>&1 &
GUARD=$!
finish() { # STATUS
  kill -KILL -- -$GUARD
  wait $GUARD
  clear_up
  pack
  rm -rf "$W"
  exit "$1"
} 2>/dev/null
trap 'echo "the script was ended by a signal" >>"$W/summary.txt"; finish 143' TERM INT

# Steps

declare -A SHARE # of the time that is left, of a step and all that follow
if [ "$RUN" = first ]; then
  ORDER=(machine build config tests capture compile table-solve table-solve_small table-codec table-gram table-proximal
    t1 memcheck tests-python)
  SHARE=([tests]=60 [capture]=35 [compile]=35 [table-solve]=20 [table-solve_small]=20 [table-codec]=16
    [table-gram]=28 [table-proximal]=18 [t1]=14 [memcheck]=30 [tests-python]=10)
else
  ORDER=(machine build config tests capture compile profile table-proximal tests-nvrtc table-gram t1 racecheck
    tests-python initcheck)
  SHARE=([tests]=50 [capture]=40 [compile]=45 [profile]=25 [table-proximal]=45 [tests-nvrtc]=40 [table-gram]=25
    [t1]=35 [racecheck]=30 [tests-python]=20 [initcheck]=25)
fi
left() { echo $((LIMIT - (SECONDS - START))); }
share() { # NAME: the seconds of a step
  local sum=0 on=0 name now
  now=$(left)
  case $1 in # without these nothing else runs
    machine) sum=15 ;;
    build) sum=$((LIMIT * 6 / 10)) ;;
    config) sum=40 ;;
    *)
      for name in "${ORDER[@]}"; do
        [ "$name" = "$1" ] && on=1
        ((on)) && sum=$((sum + SHARE[$name]))
      done
      sum=$((now * SHARE[$1] / sum))
      ((sum < 10)) && sum=10
      ;;
  esac
  echo $((sum < now ? sum : now))
}
say() { echo "$1: $2, $3 s, at $((SECONDS - START)) s of $LIMIT" | tee -a "$W/summary.txt"; }
gone() { # SECONDS PID: waits so long for its end
  local until=$((SECONDS + $1))
  while kill -0 "$2" 2>/dev/null; do
    ((SECONDS >= until)) && return 1
    sleep 0.2
  done
}
limited() { # SECONDS COMMAND...: SIGINT to all of it, so that Python says what it has; SIGKILL when that took too long
  local limit=$1 pid rc=0
  shift
  rm -f "$W/cut"
  setsid env --default-signal=INT "$@" & # background jobs ignore SIGINT otherwise
  pid=$!
  echo $pid >>"$W/groups"
  if ! gone "$limit" $pid; then
    : >"$W/cut"
    kill -INT -- -$pid
    gone 12 $pid || kill -KILL -- -$pid # xdist waits ten seconds for its workers
    gone 3 $pid || return 137           # in the driver: nothing ends it
  fi
  wait $pid || rc=$?
  kill -KILL -- -$pid 2>/dev/null # what it left running
  return $rc
}
step() { # NAME COMMAND...
  local name=$1 limit began=$SECONDS rc=0 verdict=ok f
  limit=$(share "$1")
  shift
  if ((limit < 6)); then
    say "$name" "NOT RUN (out of time)" 0
    STATUS=1
    return 1
  fi
  ((limit > 40)) && limit=$((limit - 12)) # the time that ending may take
  limited "$limit" "$@" >"$W/$name.log" 2>&1 || rc=$?
  if [ -e "$W/cut" ]; then
    verdict="CUT after $limit s ($rc)"
    STATUS=1
  elif ((rc == 5)) && { [ $DEVICE = cpu ] || [ "$name" = tests-nvrtc ]; }; then
    verdict="nothing to run"
  elif ((rc)); then
    verdict="FAILED ($rc)"
    STATUS=1
  fi
  say "$name" "$verdict" $((SECONDS - began))
  for f in "$W"/9running-*.log; do # of workers that did not come to their test's end
    [ -s "$f" ] && { echo "  in $(head -n 1 "$f")" | tee -a "$W/summary.txt"; cat "$f" >>"$W/$name.log"; }
    rm -f "$f"
  done
  tail -n 4 "$W/$name.log" | cut -c1-300
  pack
  return "$rc"
}
background() { # NAME COMMAND...
  local name=$1
  shift
  setsid nice -n 15 "$@" >"$W/$name.log" 2>&1 &
  echo $! >>"$W/groups"
  STARTED+=($!)
}
STARTED=()
await() { # what was started in the background, but no more than a quarter of the time that is left
  local pid until=$((SECONDS + $(left) / 4))
  for pid in "${STARTED[@]}"; do
    gone $((until > SECONDS ? until - SECONDS : 0)) "$pid" || kill -KILL -- "-$pid"
  done
  STARTED=()
}

machine() {
  nvidia-smi
  nvcc --version
  g++ --version | head -1
  lscpu | grep -E "Model name|^CPU\(s\)"
  free -g | head -2
  "$PYTHON" --version
  "$PYTHON" -m pip list 2>/dev/null |
    grep -iE "^(torch|triton|cupy|numpy|pytest|cmake|ninja|pybind11|scikit-build|quack|nvidia-nvcomp)"
  true
}
export -f machine
DEVICE=cpu
step machine bash -c machine
limited 40 "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >"$W/device.log" 2>&1 && DEVICE=cuda
if [ $DEVICE = cpu ]; then
  echo "no CUDA device: a rehearsal" | tee -a "$W/summary.txt"
  export CFL_GPU_TESTS=rehearse
  TABLE_ARGS=(--device cpu --small) T1_ARGS=(--device cpu --width 8 --cells 16x64) SMALL_ARGS=(--device cpu)
  PROFILE_ARGS=(--device cpu --small)
else
  export CFL_GPU_TESTS=required
  TABLE_ARGS=() T1_ARGS=(--cells 128x512) SMALL_ARGS=() PROFILE_ARGS=()
fi

# Build

INSTALL=("$PYTHON" -m pip install -q --no-build-isolation --no-deps --no-index --upgrade --target "$W/site")
if [ "${BUILD:-yes}" = yes ]; then
  export PYTHONPATH="$W/site${PYTHONPATH:+:$PYTHONPATH}"
  if ! step build "${INSTALL[@]}" "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=${ARCH:-90}" .; then
    # Triton's kernels need no compiler; NVRTC has CuPy's.
    echo "the extension is not there: going on without" | tee -a "$W/summary.txt"
    limited 60 "${INSTALL[@]}" -Ccmake.define.CFL_OPS_EXTENSION=OFF . >"$W/build-python.log" 2>&1
  fi
fi
step config "$PYTHON" -c '
import filecmp, importlib.util, pathlib
import torch, cfl_ops
cfl_ops.config.show()
print(cfl_ops.__file__)
kernels = pathlib.Path(importlib.util.find_spec("cfl_ops.triton_kernels").origin).parent
for here, there in (("python/cfl_ops", pathlib.Path(cfl_ops.__file__).parent), ("triton_kernels", kernels)):
    for path in pathlib.Path(here).rglob("*.py"):
        same = filecmp.cmp(path, there / path.relative_to(here), shallow=False)
        assert same, f"{path} is not what was imported"
report = cfl_ops.config.info()
assert report["extension"], "no extension"
assert torch.version.cuda is None or report["CUDA C++"].startswith("compiled with"), report["CUDA C++"]'

# Tests

if [ "$RUN" = second ] && [ $DEVICE = cuda ]; then # CuPy keeps what it compiles: its tests find it
  for family in codec exact solve cholesky; do
    background "nvrtc-$family" "$PYTHON" -c "
import cfl_ops
cfl_ops._gpu.native.kernels('nvrtc').module('$family').compile()"
  done
fi
T=("$PYTHON" -m pytest tests/gpu/test_gpu.py tests/core/test_arrays.py -m gpu -q -rfE --tb=short -p no:cacheprovider)
T+=(-W default::DeprecationWarning) # of a Python that is newer than the one these tests were written on
T+=(--timeout-method=thread --max-worker-restart 60)
# What else is installed there (hypothesis, jaxtyping, torch's own) takes each worker seconds to import.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
T+=(-p xdist.plugin -p pytest_timeout)
FEW=$((WORKERS > 6 ? 6 : WORKERS))
export OMP_NUM_THREADS=1
# Capture and compile by themselves: a capture that fails leaves its process odd.
step tests "${T[@]}" --timeout 40 -n "$WORKERS" -k "(${TESTS:-not nvrtc and not python}) and not captured and not compiled"
step capture "${T[@]}" --timeout 30 -n $FEW -k "(${TESTS:-gpu}) and captured"
step compile "${T[@]}" --timeout 60 -n $FEW -k "(${TESTS:-gpu}) and compiled"

# Tables

inside() { # NAME: the seconds that a step may give itself
  local seconds
  seconds=$(share "$1")
  echo $((seconds > 12 ? seconds - 8 : 4))
}
table() { # FAMILY: one process each, so that a lost context costs one family
  local known=()
  [ -n "$CEILINGS" ] && known=(--ceilings "$CEILINGS")
  step "table-$1" "$PYTHON" benches/gpu_table.py --family "$1" --out "$W/table-$1" --seconds "$(inside "table-$1")" \
    "${TABLE_ARGS[@]}" "${known[@]}"
  [ -s "$W/table-$1/gpu_table.json" ] && CEILINGS=$W/table-$1/gpu_table.json
}
nvrtc() {
  await
  export OMP_NUM_THREADS=1
  step tests-nvrtc "${T[@]}" --timeout 20 -n "$WORKERS" -k "nvrtc and not captured and not compiled"
  unset OMP_NUM_THREADS
}
unset OMP_NUM_THREADS
CEILINGS=""
t1() { # OPTIONS...
  step t1 env TORCHINDUCTOR_CACHE_DIR="$W/inductor-t1" "$PYTHON" benches/paper/t1_gpu.py --out "$W/t1" --seconds "$(inside t1)" --repeats 10 --networks resnet18 \
    "${T1_ARGS[@]}" "$@"
}
# Our own kernels: compute-sanitizer takes a part of their names.
OURS=()
for kernel in cfl $(grep -hoE "def _\w+_kernel\(" triton_kernels/*.py | grep -oE "_\w+" | sort -u); do
  OURS+=(--kernel-name "kns=$kernel")
done
sanitize() { # TOOL OPTIONS... -- OPTIONS OF THE RUN...: each allocation by itself, so that its end is seen
  local tool=$1 options=()
  shift
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  local run=("$PYTHON" benches/gpu_small_run.py "${SMALL_ARGS[@]}" "$@")
  if [ $DEVICE = cpu ]; then
    step "$tool" "${run[@]}"
  else
    step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --report-api-errors no \
      --target-processes application-only --error-exitcode 9 "${options[@]}" "${run[@]}"
  fi
}
if [ "$RUN" = first ]; then
  for family in solve solve_small codec gram proximal; do table $family; done
  t1 --eager
  sanitize memcheck --padding 64 "${OURS[@]}" --
else
  step profile "$PYTHON" benches/gpu_profile.py "${PROFILE_ARGS[@]}"
  table proximal
  nvrtc
  table gram
  t1
  sanitize racecheck --kernel-name kns=solve --kernel-name kns=cholesky -- --family linalg
fi
export OMP_NUM_THREADS=1
# torch's own ops on this card: what the fallback stands on
step tests-python "${T[@]}" --timeout 20 -n "$WORKERS" -k "python and not captured and not compiled"
unset OMP_NUM_THREADS
# Of all kernels: what torch's wrote counts as written only where those are watched, too.
[ "$RUN" = second ] && sanitize initcheck -- --family linalg

echo "$(grep -c '^===' "$CFL_FAILURES") failures logged" >>"$W/summary.txt"
echo "-----"
cat "$W/summary.txt"
finish $STATUS
