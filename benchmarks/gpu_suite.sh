#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu_suite.sh [step ...]     steps: build tests sanitize kernels profile latency scoring (default: these)
#                                          and models, pruning, which go on from what they left in OUT
#
#   OUT     folder of the results          (default: benchmarks/results/gpu)
#   WHEELS  folder of wheels to use first  (default: .whl; nothing is fetched from a network)
#   PYTHON  the interpreter                (default: python3)
#
# A step that fails does not stop the others. Exit code: 0, every step that was asked for ran and passed;
# 1, at least one failed; 3, nothing could run. It writes at most 8 small files into OUT.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=${OUT:-benchmarks/results/gpu}
WHEELS=${WHEELS:-.whl}
PYTHON=${PYTHON:-python3}
STEPS=("$@")
[ ${#STEPS[@]} -eq 0 ] && STEPS=(build tests sanitize kernels profile latency scoring)
mkdir -p "$OUT" || exit 1
LOG=$OUT/suite.log
: >"$LOG"
RECORD=$(mktemp)
trap 'rm -f "$RECORD"' EXIT
export PYTHONUNBUFFERED=1

note() { # step, outcome, seconds
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$RECORD"
  printf '== %s: %s (%s s)\n' "$1" "$2" "$3" | tee -a "$LOG"
}

step() { # name, time limit in seconds, command ...
  local name=$1 limit=$2 begin=$SECONDS code
  shift 2
  printf '== %s: %s\n' "$name" "$*" | tee -a "$LOG"
  timeout "$limit" "$@" 2>&1 | tail -n 4000 | tee -a "$LOG"
  code=${PIPESTATUS[0]}
  if [ "$code" -eq 0 ]; then note "$name" ok $((SECONDS - begin)); else
    note "$name" "failed: exit code $code" $((SECONDS - begin))
  fi
  return "$code"
}

bench() { # name, script
  if [ -f "benchmarks/$2" ]; then
    step "$1" 560 "$PYTHON" "benchmarks/$2" --device cuda --json "$OUT/$1.json"
  else
    note "$1" "skipped: benchmarks/$2 is not there" 0
  fi
}

no_gpu=""
if ! command -v nvidia-smi >/dev/null 2>&1 || ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
  no_gpu="no GPU"
fi

if compgen -G "$WHEELS/*.whl" >/dev/null && [ -z "$no_gpu" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$RECORD" "$site"' EXIT
  step wheels 300 "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$site" "$WHEELS"/*.whl && export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi

for name in "${STEPS[@]}"; do
  if [ -n "$no_gpu" ]; then
    note "$name" "skipped: $no_gpu" 0
    continue
  fi
  case $name in
    build)
      IDAP_CUDA=1 step build 580 "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
      # Tests skip themselves where the kernels are unavailable: here that is a failure.
      step backend 60 "$PYTHON" -c 'import sys, idap_kernels; sys.exit(idap_kernels.available_backends()["cuda"])'
      ;;
    tests)
      step tests 580 "$PYTHON" -m pytest -q -rs -p no:cacheprovider \
        tests/kernels/test_cuda_gpu.py tests/kernels/test_triton.py -k gpu
      ;;
    sanitize)
      sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
      if [ ! -x "$sanitizer" ]; then
        note sanitize "skipped: no compute-sanitizer" 0
        continue
      fi
      for tool in memcheck racecheck initcheck; do
        # Without its cache, each tensor of torch is an allocation of its own with its own bounds.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 300 "$sanitizer" --tool "$tool" --error-exitcode 9 \
          "$PYTHON" benchmarks/gpu_sanitize.py
      done
      ;;
    kernels) bench kernels bench_kernels.py ;;
    profile) bench profile bench_profile.py ;;
    latency) bench latency bench_latency.py ;;
    scoring) bench scoring bench_scoring.py ;;
    models)
      # Row after row, each in a process of its own; the ones that are there are kept.
      step models 590 "$PYTHON" benchmarks/bench_models.py --device cuda --jsonl "$OUT/models.jsonl" --limit 240 \
        --steps filters,layers,exact,latency
      ;;
    pruning)
      # An hour of short runs on a CPU: what is done stays, and the next call goes on from there.
      step pruning 560 "$PYTHON" benchmarks/bench_pruning.py --device cuda --json "$OUT/pruning.jsonl" \
        --cache "${TMPDIR:-/tmp}/idap-bases"
      ;;
    *) note "$name" "failed: no such step" 0 ;;
  esac
done

tail -c 4000000 "$LOG" >"$LOG.tail" && mv "$LOG.tail" "$LOG"
RECORD=$RECORD "$PYTHON" - "$OUT/suite.json" <<'PYTHON_END'
import json, os, platform, subprocess, sys


def line(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def version(name):
    try:
        from importlib.metadata import version

        return version(name)
    except Exception:
        return None


with open(os.environ["RECORD"], encoding="utf-8") as f:
    rows = [r.rstrip("\n").split("\t") for r in f]
query = line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
device, driver = (query.split(", ") + [None])[:2] if query else (None, None)
nvcc = None
try:
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    nvcc = next((t.strip() for t in text.splitlines() if "release" in t), None)
except OSError:
    pass
result = {
    "device": device,
    "driver": driver,
    "nvcc": nvcc,
    "python": platform.python_version(),
    "packages": {n: version(n) for n in ("torch", "triton", "torchvision", "timm", "idap")},
    "commit": line("git", "rev-parse", "HEAD"),
    "steps": [{"step": s, "outcome": o, "seconds": int(t)} for s, o, t in rows],
}
with open(sys.argv[1], "w", encoding="utf-8") as f:
    json.dump(result, f, indent=2)
    f.write("\n")
PYTHON_END

echo
echo "summary ($OUT)"
awk -F'\t' '{ printf "  %-12s %s\n", $1, $2 }' "$RECORD"
if grep -q $'\tfailed' "$RECORD"; then exit 1; fi
if ! grep -q $'\tok\t' "$RECORD"; then exit 3; fi
exit 0
