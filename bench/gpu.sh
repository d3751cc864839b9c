#!/usr/bin/env bash
# bench/gpu.sh OUTDIR [SECONDS]
#
# On a GPU machine with torch, triton and nvcc, and no network: builds the libraries for its GPU, runs the GPU tests,
# and measures, all within SECONDS (540 unless given), what tells most first: a few tests of each backend, the training
# steps that the project's targets name, the other tests, the other cases. Whatever fails on the way, OUTDIR gets a log
# of every step, summary.txt with their outcomes, and what was measured, as one JSON, report and plots. The exit status
# is 0 if every step passed.
#
#   PYTHON   the interpreter that has torch; python3 unless set
#   WHEELS   a folder of wheels for what it lacks of typer, rich, safetensors, matplotlib, pytest, hypothesis
#   DEVICE   cuda unless set; cpu tries the script out where there is no GPU
#   AEFAST_COMMIT   what the results name as the commit if this is no checkout
set -uo pipefail

if [[ $# -lt 1 || $# -gt 2 || ! ${2:-540} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bench/gpu.sh OUTDIR [SECONDS]" >&2
  exit 2
fi
ROOT=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" || exit 2
OUT=$(cd "$1" && pwd)
LIMIT=${2:-540}
# Seconds in which a benchmark draws its report.
SPARE=20
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cd "$ROOT"

remaining() { echo $((LIMIT - SECONDS)); }

failed=0
: >"$OUT/summary.txt"
# step NAME SECONDS COMMAND...: runs it for at most that long, its output in NAME.log.
step() {
  local name=$1 most=$2 start=$SECONDS status
  shift 2
  if ((most <= 0)); then
    status="not run: no time left"
    failed=1
  else
    # An interrupted Python program tells what it has found so far, which takes it a few seconds.
    env --default-signal=INT timeout --signal=INT --kill-after=$SPARE "$most" "$@" >"$OUT/$name.log" 2>&1
    case $? in
      0) status=passed ;;
      124 | 137) status="stopped after $most s" && failed=1 ;;
      *) status="FAILED: $(grep -v '^[[:space:]]*$' "$OUT/$name.log" | tail -n 1)" && failed=1 ;;
    esac
  fi
  printf '%-12s %4d s  %s\n' "$name" $((SECONDS - start)) "$status" | tee -a "$OUT/summary.txt"
}

environment() {
  uname -a
  nvidia-smi || [[ $DEVICE != cuda ]] || return 1
  nvcc --version || [[ $DEVICE != cuda ]] || return 1
  if [[ -n ${WHEELS:-} ]]; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$WORK/site" "$WHEELS"/*.whl || return 1
  fi
  "$PYTHON" - "$DEVICE" <<'PYTHON_END'
import importlib, sys
import torch
print("python", sys.version)
for name in ("torch", "triton", "numpy", "typer", "rich", "safetensors", "matplotlib", "pytest", "hypothesis"):
    try:
        print(name, getattr(importlib.import_module(name), "__version__", "present"))
    except ImportError as error:
        print(name, "missing:", error)
if sys.argv[1] == "cuda":
    print(torch.cuda.get_device_properties(0))
PYTHON_END
}

# The package without an installer: its parts linked to where setup.py would put them.
build() {
  local torch architecture=native generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  torch=$("$PYTHON" -c 'import torch, pathlib; print(pathlib.Path(torch.__file__).parent)') || return 1
  mkdir -p "$WORK/site/aefast/lib"
  find "$ROOT/aefast" -mindepth 1 -maxdepth 1 ! -name lib -exec ln -s -t "$WORK/site/aefast" {} +
  ln -s -t "$WORK/site/aefast" "$ROOT/kernels" "$ROOT/bench"
  if [[ $DEVICE == cuda ]]; then
    architecture=$("$PYTHON" -c 'import torch; print("{}{}".format(*torch.cuda.get_device_capability()))') || return 1
    if ((architecture == 90)); then architecture=90a; fi
  else
    export AEFAST_BUILD_CUDA=0
  fi
  cmake -S "$ROOT" -B "$WORK/build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DTORCH_INCLUDE_DIR="$torch/include" \
    -DTORCH_LIB_DIR="$torch/lib" -DAEFAST_OUTPUT_DIR="$WORK/site/aefast/lib" \
    -DAEFAST_CUDA_ARCHITECTURES="$architecture-real" &&
    cmake --build "$WORK/build" --parallel
}

export PYTHON DEVICE ROOT WORK WHEELS=${WHEELS:-}
export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TERM=dumb COLUMNS=180
export -f environment build

# The files that have tests of a mark: to collect all tests takes as long as these do.
marked() { grep -rl --include='test_*.py' "pytest.mark.$1" "$ROOT/tests"; }

# pytest_step NAME SECONDS parallel|serial MARKS FILES...: the GPU tests of these marks.
pytest_step() {
  local name=$1 most=$2 order=$3 arguments=(-m "gpu and $4" "${@:5}")
  if [[ $DEVICE != cuda ]]; then arguments=("$ROOT/tests/bench/test_ceilings.py"); fi
  # Most of their time Triton compiles, on one core.
  if [[ $order == parallel ]] && "$PYTHON" -c "import xdist" 2>/dev/null; then
    arguments+=(--numprocesses "$(nproc)" --dist worksteal)
  fi
  step "$name" "$most" "$PYTHON" -m pytest --verbose --tb=short -p no:cacheprovider \
    -c "$ROOT/pyproject.toml" --rootdir "$ROOT" "${arguments[@]}"
}

at_most() { echo $(($1 < $2 ? $1 : $2)); }

# benchmark_step NAME SECONDS ARGUMENTS...: a part of the benchmark. At the end a case under way is finished, or
# interrupted after as long again, and the report is drawn.
benchmark_step() {
  local name=$1 most=$2 spare
  spare=$(at_most $SPARE $((most / 3)))
  step "$name" $((most - spare)) "$PYTHON" -m aefast.cli bench --device "$DEVICE" --report "$OUT" --no-estimates \
    --limit $((most - 2 * spare)) "${@:3}"
}

step environment "$(remaining)" bash -c environment
step build "$(remaining)" bash -c build
# From here on nothing is imported from the repository's own folder, in which the package lacks parts.
cd "$WORK"
step info "$(remaining)" "$PYTHON" -m aefast.cli info
mapfile -t files < <(marked smoke)
pytest_step smoke "$(at_most 60 $(($(remaining) / 4)))" parallel smoke "${files[@]}"
benchmark_step targets $(($(remaining) * 3 / 5)) --targets
pytest_step tests $(($(remaining) * 2 / 5)) parallel "not smoke and not alone" "$ROOT/tests"
mapfile -t files < <(marked alone)
pytest_step alone "$(at_most 60 $(($(remaining) / 3)))" serial alone "${files[@]}"
benchmark_step benchmark "$(remaining)" --resume
exit $failed
