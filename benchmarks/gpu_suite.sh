#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, compute-sanitizer, benchmarks; then every target beside
# what was measured.
#
#   benchmarks/gpu_suite.sh [step ...]
#
#   build          the extensions, for the GPU that is here; skipped where they are built of these sources. Every
#                  other step that finds them missing builds them first
#   counters       bytes read from memory, by hardware counters: counters.json
#   profile        a profile of ResNet-50 over its forward pass: profile.json
#   tests          the tests that need a GPU
#   kernels        channel_stats and the cost of a call: kernels.json
#   kernels-more   bn_act_stats, filter_norms, pair_stats: kernels-more.json
#   latency        batch-1 latency of ResNet-50, as it is and pruned: latency.json
#   sanitize       memcheck, racecheck, initcheck
#   scoring        time of scores in other pruners: scoring.json
#   models, pruning   only when asked for; they go on from what they left in OUT
#
#   OUT     folder of the results          (default: benchmarks/results/gpu)
#   WHEELS  folder of wheels to use first  (default: .whl; nothing is fetched from a network)
#   PYTHON  the interpreter                (default: python3)
#   BUDGET  seconds for the whole call     (default: none; a step that does not begin in time is skipped)
#   COMMIT  what the results are of        (where there is no git)
#   STAMP   file that says of which sources the extensions are  (default: build/gpu_suite.sources)
#
# Where a command may last ten minutes only, three calls; on one machine the later ones find the extensions built:
#
#   BUDGET=580 benchmarks/gpu_suite.sh build counters profile tests
#   BUDGET=580 benchmarks/gpu_suite.sh kernels latency
#   BUDGET=580 benchmarks/gpu_suite.sh kernels-more sanitize scoring
#   python benchmarks/bars.py FOLDER ...   the targets, of the results of several calls
#
# A step that fails does not stop the others. Exit code: 0, every step that was asked for ran and passed;
# 1, at least one failed; 3, nothing could run. It writes at most 8 small files into OUT.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

OUT=${OUT:-benchmarks/results/gpu}
WHEELS=${WHEELS:-.whl}
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-}
STAMP=${STAMP:-build/gpu_suite.sources}
STEPS=("$@")
[ ${#STEPS[@]} -eq 0 ] && STEPS=(build counters profile tests kernels kernels-more latency sanitize scoring)
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

least() { # of a time limit in seconds and what is left of the budget
  local left=$((BUDGET - SECONDS))
  if [ -n "$BUDGET" ] && [ "$left" -lt "$1" ]; then echo "$left"; else echo "$1"; fi
}

step() { # name, time limit in seconds, command ...
  local name=$1 limit begin=$SECONDS code
  limit=$(least "$2")
  shift 2
  if [ "$limit" -lt 20 ]; then
    note "$name" "skipped: no time left" 0
    return 1
  fi
  printf '== %s: %s\n' "$name" "$*" | tee -a "$LOG"
  timeout "$limit" "$@" 2>&1 | tail -n 4000 | tee -a "$LOG"
  code=${PIPESTATUS[0]}
  if [ "$code" -eq 0 ]; then note "$name" ok $((SECONDS - begin)); else
    note "$name" "failed: exit code $code" $((SECONDS - begin))
  fi
  return "$code"
}

bench() { # name, time limit in seconds, script, arguments ...
  local name=$1 limit=$2 script=$3
  shift 3
  step "$name" "$limit" "$PYTHON" "benchmarks/$script" --device cuda --json "$OUT/$name.json" "$@"
}

sources() { # a fingerprint of what the extensions are built of
  find csrc setup.py build_backend.py -type f | sort | xargs sha256sum | sha256sum
}

# Tests skip themselves where the kernels are unavailable: here that is a failure.
HAVE_CUDA=("$PYTHON" -c 'import sys, idap_kernels; sys.exit(idap_kernels.available_backends()["cuda"])')

built=""
build() {
  [ -n "$built" ] && return
  built=yes
  local archs now
  now=$(sources)
  if [ "$(cat "$STAMP" 2>/dev/null)" = "$now" ] && "${HAVE_CUDA[@]}" >/dev/null 2>&1; then
    note build "ok, as it was" 0
    return
  fi
  archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | tr '\n' ' ')
  IDAP_CUDA=1 IDAP_CUDA_ARCHS=${IDAP_CUDA_ARCHS:-$archs} step build 400 \
    "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
  step backend 60 "${HAVE_CUDA[@]}" && mkdir -p "$(dirname "$STAMP")" && echo "$now" >"$STAMP"
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
  build
  case $name in
    build) ;;
    counters) bench counters 270 gpu_counters.py ;;
    profile) bench profile 300 bench_profile.py ;;
    tests)
      step tests 400 "$PYTHON" -m pytest -q -rs -p no:cacheprovider -k gpu \
        tests/kernels tests/pruning/test_cuda_graph.py tests/pruning/test_fusion.py
      ;;
    kernels) bench kernels 560 bench_kernels.py --ops launch,channel_stats --limit $(($(least 560) - 40)) ;;
    kernels-more)
      bench kernels-more 560 bench_kernels.py --ops filter_norms,bn_act_stats,pair_stats \
        --limit $(($(least 560) - 40))
      ;;
    latency) bench latency 300 bench_latency.py ;;
    sanitize)
      sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
      if [ ! -x "$sanitizer" ]; then
        note sanitize "skipped: no compute-sanitizer" 0
        continue
      fi
      for tool in memcheck racecheck initcheck; do
        # Without its cache, each tensor of torch is an allocation of its own with its own bounds.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$tool" 200 "$sanitizer" --tool "$tool" --error-exitcode 9 \
          "$PYTHON" benchmarks/gpu_sanitize.py
      done
      ;;
    scoring) bench scoring 560 bench_scoring.py ;;
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
RECORD=$RECORD "$PYTHON" - "$OUT" <<'PYTHON_END'
import json, os, platform, subprocess, sys

sys.path.insert(0, "benchmarks")
import bars


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
    "commit": line("git", "rev-parse", "HEAD") or os.environ.get("COMMIT"),
    "steps": [{"step": s, "outcome": o, "seconds": int(t)} for s, o, t in rows],
}
try:
    result["bars"] = bars.evaluate(bars.load([sys.argv[1]]))
    print(f"\n{bars.text(result['bars'])}")
except (KeyError, ValueError) as error:
    result["bars"] = f"not made: {type(error).__name__}: {error}"
    print(result["bars"])
with open(os.path.join(sys.argv[1], "suite.json"), "w", encoding="utf-8") as f:
    json.dump(result, f, indent=2, ensure_ascii=False)
    f.write("\n")
PYTHON_END

echo
echo "summary ($OUT)"
awk -F'\t' '{ printf "  %-12s %s\n", $1, $2 }' "$RECORD"
if grep -q $'\tfailed' "$RECORD"; then exit 1; fi
if ! grep -q $'\tok' "$RECORD"; then exit 3; fi
exit 0
