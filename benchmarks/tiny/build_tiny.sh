#!/usr/bin/env bash
# Builds the tiny checkpoint from nothing: dense training, data, retrofit, evaluation.
#   benchmarks/tiny/build_tiny.sh WORK [tiny|smoke] [DENSE_MINUTES] [RETROFIT_MINUTES]
# Leaves WORK/dense, WORK/data.jsonl, WORK/dms, WORK/quality.json; run again, it goes on where it stopped.
set -euo pipefail
work=$1 preset=${2:-tiny} dense_minutes=${3:-60} retrofit_minutes=${4:-10}
python=${PYTHON:-python3}
case $preset in
    tiny) length=4096 require=0.95 rows=512 documents=64 recipe=(--window 64 --ratio 8 --steps 600 --batch 16 --micro-batch 8 --lr 2e-4) ;;
    smoke) length=256 require=0.8 rows=512 documents=32 recipe=(--window 16 --ratio 4 --steps 200 --batch 8 --micro-batch 8 --lr 5e-4) ;;
    *) echo "build_tiny.sh: preset $preset is neither tiny nor smoke" >&2; exit 2 ;;
esac
# cuBLAS adds up in the same order every time only with a workspace of its own.
export CUBLAS_WORKSPACE_CONFIG=:4096:8
mkdir -p "$work"

if [ ! -f "$work/dense/training/summary.json" ]; then
    echo "== dense model, at most $dense_minutes minutes"
    "$python" -m benchmarks.tiny.train_dense --preset "$preset" --out "$work/dense" \
        --max-minutes "$dense_minutes" --require "$require" --resume
fi
if [ ! -f "$work/data.jsonl" ]; then
    echo "== $rows rows of $length tokens"
    "$python" -m benchmarks.tiny.make_data --rows "$rows" --length "$length" --out "$work/data.jsonl"
fi
if [ ! -f "$work/dms/model.safetensors" ]; then
    echo "== retrofit, at most $retrofit_minutes minutes"
    "$python" -m vllm_dms.retrofit "$work/dense" --data "$work/data.jsonl" --out "$work/dms" --length "$length" \
        "${recipe[@]}" --max-minutes "$retrofit_minutes" --resume
fi
echo "== evaluation on $documents held-out documents"
"$python" -m benchmarks.tiny.evaluate "$work/dms" --length "$length" --documents "$documents" --out "$work/quality.json"
rm -f "$work/dense/training/state.pt" "$work/dms/training/state.pt"
(cd "$work/dms" && sha256sum model.safetensors)
