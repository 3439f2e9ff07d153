#!/usr/bin/env bash
# Builds the tiny checkpoint from nothing: dense training, data, retrofit, evaluation.
#   examples/tiny/build_tiny.sh WORK [tiny|smoke] [DENSE_MINUTES] [RETROFIT_MINUTES]
# Leaves WORK/dense, WORK/data.jsonl, WORK/dms, WORK/quality.json; run again, it goes on where it stopped.
# The seed decides every byte, on one kind of machine; with limits in minutes the clock has a say, too.
set -euo pipefail
work=$1 preset=${2:-tiny}
dense_limit=(${3:+--max-minutes "$3"}) retrofit_limit=(${4:+--max-minutes "$4"})
python=${PYTHON:-python3}
source "$(dirname "${BASH_SOURCE[0]}")/presets.sh"
mkdir -p "$work"

if [ ! -f "$work/dense/training/summary.json" ]; then
    echo "== dense model"
    "$python" -m examples.tiny.train_dense --preset "$preset" --out "$work/dense" --require "$require" \
        "${dense_limit[@]}" --resume
fi
if [ ! -f "$work/data.jsonl" ]; then
    echo "== $rows rows of $length tokens"
    "$python" -m examples.tiny.make_data --rows "$rows" --length "$length" --out "$work/data.jsonl"
fi
if [ ! -f "$work/dms/model.safetensors" ]; then
    echo "== retrofit"
    "$python" -m vllm_dms.retrofit "$work/dense" --data "$work/data.jsonl" --out "$work/dms" \
        "${recipe[@]}" "${retrofit_limit[@]}" --resume
fi
echo "== evaluation on $documents held-out documents"
"$python" -m examples.tiny.evaluate "$work/dms" --length "$length" --documents "$documents" --out "$work/quality.json"
rm -f "$work/dense/training/state.pt" "$work/dms/training/state.pt"
(cd "$work/dms" && sha256sum model.safetensors)
