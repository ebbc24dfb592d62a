#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes:
#
#     benchmarks/gpu/run.sh            # results in $OUT, or benchmarks/results/
#
# Builds the extension for this card, runs the self-test, the gpu tests, compute-sanitizer on small
# shapes and the benchmarks, and compiles the Triton kernels ahead of time for this card. A stage
# that fails or takes too long does not stop the next ones; summary.json tells how each one ended,
# and on which hardware, driver, versions and commit (that of the repository, or COMMIT). Without
# a GPU it says so and writes nothing. What is not timed runs side by side; the limits of the
# stages, one after another, add up to less than nine minutes. LIMIT is a number of seconds for all
# of them: what it leaves no time for, at the end, is left out and said to be.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

if ! nvidia-smi -L >/dev/null 2>&1; then
  echo "benchmarks/gpu/run.sh: no NVIDIA GPU here; nothing was run and nothing written"
  exit 0
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  .venv/bin/python -c 'import torch' 2>/dev/null && python=.venv/bin/python
fi
out=${OUT:-benchmarks/results}
mkdir -p "$out"
stages=$(mktemp)
trap 'rm -f "$stages"' EXIT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# Scripts of this folder find the package where it is not installed.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# A script in the background ignores the signal, and so would its commands.
heard=()
env --default-signal=INT true 2>/dev/null && heard=(env --default-signal=INT)

# stage NAME SECONDS FILE COMMAND...: runs a command with a time limit; its output goes to FILE.
stage() {
  local name=$1 limit=$2 file=$out/$3 started=$SECONDS status=0
  local left=$((${LIMIT:-540} - SECONDS))
  shift 3
  if [ "$left" -lt 5 ]; then
    echo "$name 125 0" >>"$stages"
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name"
  # Interrupted, pytest and the benchmarks still say what they have found so far.
  timeout --signal=INT --kill-after=10 "$limit" "${heard[@]}" "$@" >>"$file" 2>"$file.err" ||
    status=$?
  # JSON stays clean: messages follow results in logs only.
  case $file in
    *.json) [ "$status" -eq 0 ] || cat "$file.err" ;;
    *) cat "$file.err" >>"$file" && tail -n 3 "$file" ;;
  esac
  rm -f "$file.err"
  [ -s "$file" ] || rm -f "$file"
  echo "$name $status $((SECONDS - started))" >>"$stages"
}

rm -f "$out"/{build,pytest,memcheck,racecheck,sanitizer}.log
rm -f "$out"/{doctor,launches,resources,bench,summary}.json
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
# Of the two extensions the one that runs here: neither is put in its place before both are built.
stage build 60 build.log \
  env COACHHOOK_BUILD_CUDA=1 COACHHOOK_BUILD_CPU=0 COACHHOOK_CUDA_ARCHS="$capability" \
  "$python" setup.py build_ext --inplace
# Compiling Triton kernels is what takes the time, and that the workers do beside one another.
workers=()
cores=$(getconf _NPROCESSORS_ONLN)
"$python" -c 'import xdist' 2>/dev/null && workers=(-n $((cores < 12 ? cores : 12)))
# Of the other tests not even the imports: they take time, and one that fails could end the stage.
stage pytest 100 pytest.log env OMP_NUM_THREADS=1 \
  "$python" -m pytest -q -m "gpu and not slow" "${workers[@]}" tests/gpu tests/csrc/test_gate_gpu.py &
stage doctor 40 doctor.json "$python" -m coachhook doctor --selftest --json &
stage resources 60 resources.json "$python" benchmarks/gpu/resources.py --json --arch "$capability" &
if command -v compute-sanitizer >/dev/null; then
  sanitizer=(compute-sanitizer --error-exitcode 1)
  small=("$python" benchmarks/gpu/small_shapes.py)
  stage memcheck 100 memcheck.log "${sanitizer[@]}" --tool memcheck "${small[@]}" &
  stage racecheck 100 racecheck.log "${sanitizer[@]}" --tool racecheck "${small[@]}" --few &
else
  echo "sanitizer 127 0" >>"$stages"
fi
wait
# Either may have had no time, or there may be no sanitizer.
for log in "$out"/{memcheck,racecheck}.log; do
  if [ -e "$log" ]; then cat "$log" >>"$out/sanitizer.log" && rm "$log"; fi
done
# A process each: a kernel that faults takes down the measurements after it in its process only.
bench() {
  stage "bench-$1" "$2" bench.json "$python" -m coachhook bench "$1" --json --device cuda --budget "$3"
}
bench edit 115 60
bench memory 25 6
bench cholesky 38 16
bench statistics 30 5
bench model 35 16
bench gram 20 3
bench hooked_linear 64 40
stage launches 30 launches.json "$python" benchmarks/gpu/launches.py --json
bench overhead 15 5

"$python" benchmarks/gpu/summary.py "$stages" "$out"
