#!/usr/bin/env bash
# Builds, checks, benchmarks, profiles and trains on a rented GPU, most important step first. Every step may be killed.
#   bash bench/gpu.sh [STEP ...]      steps: build check latency ops ncu train baselines; default: all but the last
# On an H200 with 16 cores, build takes 45 s, check 75 s, latency 100 s and ops some minutes. With ten minutes per call:
# `build check latency`, then `ops ncu`. build runs first if nothing is built yet.
# check (or: tests, sanitizer) runs everything that is not timed, in parallel, and compiles the kernels of the timed
# steps. latency and ops (or: bench) time one thing at a time.
# Output folder: $OUT (default: runs/gpu). It gets STEP.json (the commands with their exit codes, the rows, and the
# targets that they meet or miss; rewritten after each command), logs.tgz (logs, plots, profiles) and compiled.tgz,
# Triton's cache. Saved as $COMPILED (default: .compiled.tgz), it spares the next run the compiler.
# CEMG_COMMIT: the commit, if .git is missing. Exits with 1 if a command failed.
# Needs Python 3.11+, torch, Triton, CuPy or nvcc, and no network. Missing packages are installed from the wheels in
# $WHEELS (default: .whl): the build needs pybind11, the tests pytest and hypothesis, training polars and pydantic, and
# each peer its own; the other steps need torch and transformers.
# DATA (default: ../shared/data) must hold beauty/ for train and baselines, which are skipped otherwise.
# baselines trains TIGER and LETTER on Beauty to the end of their papers' trainings, which takes hours; it has not run on
# a GPU yet. Its runs are in $RUNS (default: runs/gpu-runs): a killed step continues there. HOURS limits the training of
# each. It leaves tiger.json, tiger-free.json, letter.json and letter-free.json in $OUT: the search, and free beams.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-runs/gpu}
DATA=${DATA:-../shared/data}
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
COMPILED=${COMPILED:-.compiled.tgz}
RUNS=${RUNS:-runs/gpu-runs}
SITE=${SITE:-/tmp/cemg-site}
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-/tmp/cemg-triton}  # the archive names this folder: keep it the same
mkdir -p "$OUT" "$TRITON_CACHE_DIR" "$SITE"
WORK=$(mktemp -d)  # not in $OUT, from which few files may be copied back
[ ! -f "$COMPILED" ] || tar -xzf "$COMPILED" -C "$TRITON_CACHE_DIR"

bounded() {  # seconds, name, command: runs it with a time limit, keeps its log and adds one line with its exit code
  local seconds=$1 name=$2 began=$SECONDS; shift 2
  timeout --signal=INT --kill-after=15 "$seconds" "$@" >"$WORK/$name.log" 2>&1
  local code=$?
  printf '{"command": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" "$((SECONDS - began))" | tee -a "$WORK/$STEP.jsonl"
  [ $code -eq 0 ] || { touch "$WORK/failed"; tail -n 15 "$WORK/$name.log"; }
  [ -n "${SIDE_BY_SIDE:-}" ] || report  # so a run that is killed keeps the finished commands
}

report() {  # writes STEP.json from the lines of `bounded` and the files STEP-*.json, and archives everything else
  "$PYTHON" - "$WORK" "$STEP" "$OUT/$STEP.json" <<'PYTHON'
import json, sys
from pathlib import Path

sys.path.insert(0, "bench")
from targets import read, targets

work, step, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
ran = [json.loads(line) for line in (work / f"{step}.jsonl").read_text().splitlines()]
results = {}
for path in sorted(work.glob(f"{step}-*.json")):
    try:
        results[path.stem] = json.loads(path.read_text())
    except ValueError as error:  # killed while writing
        results[path.stem] = f"unreadable: {error}"
met = targets(read(sorted(work.glob(f"{step}-*.json"))))
for name, found in met.items():
    print(f"{name}: {found['measured']:.4g} of {found['goal']:.4g}, {'met' if found['met'] else 'missed'}")
out.write_text(json.dumps({"step": step, "ran": ran, "targets": met, "results": results}, indent=1) + "\n")
PYTHON
  tar -czf "$OUT/logs.tgz" -C "$WORK" .
}

keep_compiled() {
  (cd "$TRITON_CACHE_DIR" && find . -name '*.json' -o -name '*.cubin' -o -name '*.so' | tar -czf - -T -) >"$OUT/compiled.tgz"
}

build() {
  if [ -d "$WHEELS" ]; then
    bounded 120 wheels "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl
  fi
  bounded 300 build "$PYTHON" -m pip install -e . --no-build-isolation --no-deps
  bounded 60 device nvidia-smi
}
check() {
  local once="--device cuda --rounds 1 --seconds 0.02" cells='B[18] W50$' workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) / 2 + 1))")
  export OMP_NUM_THREADS=3 SIDE_BY_SIDE=yes
  CEMG_NO_SKIPS=1 bounded 300 tests "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py tests/kernels \
    "${workers[@]}" --junitxml "$WORK/tests.xml" &
  # without torch's memory cache, so that a read past a tensor is a read past an allocation
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 bounded 200 sanitizer-trie compute-sanitizer --error-exitcode 9 \
    "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py -k "every_trie_operation or filters_made_here" &
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 bounded 300 sanitizer-triton compute-sanitizer --error-exitcode 9 \
    "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py \
    -k "(beam_step and valid and 256-50) or (attention and float32) or log_sum_exp or propagation or codes" &
  for size in 256 2048; do
    bounded 200 "compile-step-$size" "$PYTHON" bench/trie_step.py $once --items 10000 --sizes $size &
  done
  for dtype in float32 bfloat16; do
    bounded 200 "compile-$dtype" "$PYTHON" bench/latency.py $once --dtype $dtype --models tiger t5-small decoder-4 \
      --cells "$cells" --engines cemg --json "$WORK/compile-$dtype.json" --plot "$WORK/compile-$dtype.png" &
  done
  for name in quantize propagate; do bounded 200 "compile-$name" "$PYTHON" "bench/$name.py" $once & done
  wait
  unset OMP_NUM_THREADS SIDE_BY_SIDE
}
latency() {  # the peers that such a machine has, and flashrec's model family if it is installed
  local models=(tiger t5-small decoder-4)
  "$PYTHON" -c 'import flashinfer, flashrec, sgl_kernel' 2>/dev/null && models+=(qwen3-0.6b)
  bounded 200 latency "$PYTHON" bench/latency.py --device cuda --seconds 0.5 --models tiger t5-small decoder-4 \
    --engines "transformers + dict trie" --json "$WORK/latency-float32.json" --plot "$WORK/latency-float32.png"
  bounded 150 latency-bf16 "$PYTHON" bench/latency.py --device cuda --dtype bfloat16 --seconds 0.5 \
    --models "${models[@]}" --cells 'W50$' --engines flashrec \
    --json "$WORK/latency-bfloat16.json" --plot "$WORK/latency-bfloat16.png"
}
timed() {  # seconds, name, options: runs a benchmark of operations
  local seconds=$1 name=$2; shift 2
  bounded "$seconds" "ops-$name" "$PYTHON" "bench/${name%-*}.py" --device cuda --seconds 0.5 \
    --json "$WORK/ops-$name.json" --plot "$WORK/ops-$name.png" "$@"
}
ops() {
  timed 150 trie_step --items 10000 1000000 10000000
  timed 90 trie_step-1e8 --users 1 --sizes 256 --items 100000000
  timed 50 propagate
  timed 50 quantize
  timed 110 trie_build --items 10000 10000000 1000000  # the last takes flashrec a minute
}
profiled() {  # name, kernels, tests: profiles the first launches of these kernels in these tests
  bounded 70 "ncu-$1" "$(type -P ncu || echo ncu)" --clock-control none --set basic --kernel-name "regex:$2" --launch-count 48 \
    --csv --log-file "$WORK/ncu-$1.csv" "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py -k "$3"
}
ncu() {
  profiled step "beam_step_kernel|merge_kernel|softmax_kernel" "softmax_and_beam_step and valid and (256-50 or 2048-50)"
  profiled attention "shared_prefix_kernel|attention_kernel" "attention and float32"
  profiled logsumexp "logsumexp_kernel" "log_sum_exp"
  profiled quantize "prepare_kernel|residual_quantize_kernel" "codes"
  profiled propagate "layer_kernel|chunk_kernel" "propagation"
  profiled trie "lookup|advance|children|mask_|interval|keep|open_level|close" "every_trie_operation or filters_made_here"
  profiled build "depth_kernel|write_kernel" "trie_built_here"
}
train() {
  if [ ! -d "$DATA/beauty" ]; then echo "$DATA/beauty is missing: train skipped"; return; fi
  bounded 500 train "$PYTHON" -c 'from cemg.commands.train import main; main()' --data "$DATA/beauty" --config configs/beauty.yaml --device cuda \
    --run "$WORK/beauty" --result "$WORK/train-beauty.json"
  rm -rf "$WORK/beauty"  # the weights are too large for $OUT
}

baselines() {
  if [ ! -d "$DATA/beauty" ]; then echo "$DATA/beauty is missing: baselines skipped"; return; fi
  local name run limit=()
  [ -z "${HOURS:-}" ] || limit=(--set "generator.budget_hours=$HOURS")
  for name in tiger letter; do
    run="$RUNS/$name"
    bounded 36000 "train-$name" "$PYTHON" -c 'from cemg.commands.train import main; main()' --data "$DATA/beauty" --config "$name" \
      --device cuda --dtype bfloat16 --run "$run" --cache "$RUNS/cache" "${limit[@]}"
    cp "$run"/results/*-cemg-test.json "$OUT/$name.json" || continue
    bounded 1800 "free-$name" "$PYTHON" -c 'from cemg.commands.evaluate import main; main()' --run "$run" --engine free \
      --device cuda --result "$OUT/$name-free.json"
  done
}

step() {
  STEP=$1
  "$STEP"
  [ ! -f "$WORK/$STEP.jsonl" ] || { report; keep_compiled; }
}

[ $# -gt 0 ] || set -- build check latency ops ncu train
[ "$1" = build ] || (cd / && "$PYTHON" -c 'import cemg_kernels') 2>/dev/null || step build
for name in "$@"; do
  case $name in
    tests | sanitizer) step check ;;
    bench) step ops ;;
    build | check | latency | ops | ncu | train | baselines) step "$name" ;;
    *) echo "unknown step $name; the top of this file lists them"; exit 2 ;;
  esac
done
[ ! -f "$WORK/failed" ]
