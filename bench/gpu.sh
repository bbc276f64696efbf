#!/usr/bin/env bash
# Everything a borrowed GPU should do, worth most first, each step bounded in time and safe to kill:
#   bash bench/gpu.sh [STEP ...]      steps: build tests sanitizer ops latency ncu train; default: all of them
# Results go to $OUT (default: runs/gpu), one JSON a step. Needs Python 3.11+, torch, Triton, CuPy or nvcc, and
# no network. DATA (default: ../shared/data) holds beauty/ for the last step; it is skipped where that is not.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-runs/gpu}
DATA=${DATA:-../shared/data}
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
SITE=${SITE:-/tmp/cemg-site}
export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"

bounded() {  # seconds, name, command: its log, and one line of how it went
  local seconds=$1 name=$2 began=$SECONDS; shift 2
  timeout --signal=INT --kill-after=20 "$seconds" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  printf '{"step": "%s", "exit": %d, "seconds": %d}\n' "$name" "$code" "$((SECONDS - began))" | tee -a "$OUT/steps.jsonl"
  [ $code -eq 0 ] || tail -n 15 "$OUT/$name.log"
}

build() {
  if [ -d "$WHEELS" ]; then  # packages the machine lacks (polars, pydantic, typer, pytest, ...), brought along
    bounded 120 wheels "$PYTHON" -m pip install -q --no-index --no-deps --upgrade --target "$SITE" "$WHEELS"/*.whl
  fi
  bounded 240 build "$PYTHON" -m pip install -e . --no-build-isolation --no-deps
}
tests() { bounded 420 tests "$PYTHON" -m pytest -q -m gpu tests --maxfail=5; }
sanitizer() {
  bounded 240 sanitizer compute-sanitizer --error-exitcode 9 "$PYTHON" -m pytest -q -m gpu tests/test_gpu.py -k trie
}
ops() {
  for name in trie_step quantize propagate; do
    bounded 150 "ops-$name" "$PYTHON" "bench/$name.py" --device cuda --seconds 2 --json "$OUT/$name-gpu.json" --plot "$OUT/$name-gpu.png"
  done
}
latency() {
  bounded 480 latency "$PYTHON" bench/latency.py --device cuda --seconds 2 --json "$OUT/latency-gpu.json" --plot "$OUT/latency-gpu.png"
  bounded 240 latency-bf16 "$PYTHON" bench/latency.py --device cuda --dtype bfloat16 --seconds 2 --engines cemg \
    --json "$OUT/latency-gpu-bf16.json" --plot "$OUT/latency-gpu-bf16.png"
}
ncu() {
  bounded 240 ncu command ncu --set basic --launch-count 40 --csv --log-file "$OUT/ncu.csv" \
    "$PYTHON" -m pytest -q bench/test_ops.py --benchmark-disable
}
train() {
  if [ ! -d "$DATA/beauty" ]; then echo "no $DATA/beauty: train skipped"; return; fi
  bounded 540 train "$PYTHON" -c 'from cemg.commands.train import main; main()' --data "$DATA/beauty" --config configs/beauty.yaml --device cuda \
    --run "$OUT/beauty" --result "$OUT/beauty-gpu.json"
}

for step in "${@:-build tests sanitizer ops latency ncu train}"; do
  for one in $step; do
    case $one in
      build | tests | sanitizer | ops | latency | ncu | train) "$one" ;;
      *) echo "unknown step $one; see the head of this file"; exit 2 ;;
    esac
  done
done
