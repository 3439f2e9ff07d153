#!/usr/bin/env bash
# demo.sh: set up, then `vllm-dms demo`: serve the embedded checkpoint and ask it about several
# thousand tokens, with and without eviction. Uses an NVIDIA GPU if there is one, else the CPU. About
# two minutes after the first set-up; the servers' logs go to build/demo.
#
# demo.sh --model smollm2: a real language model instead. SmolLM2-135M-Instruct comes from PyPI, its
# decisions from examples/smollm2/adapter, and the chat is about LICENSE and CONTRIBUTING.md.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=embedded
case ${1:-} in
    --model) model=${2:-} && shift $(($# < 2 ? $# : 2)) ;;
    --model=*) model=${1#*=} && shift ;;
esac
case $model in
    embedded | smollm2) ;;
    *) echo "demo: --model '$model' is neither embedded nor smollm2" >&2; exit 2 ;;
esac
python=$(bash scripts/setup.sh)
if [ $model = smollm2 ]; then
    work=build/smollm2
    PYTHON=$python bash examples/smollm2/weights.sh $work
    cat LICENSE CONTRIBUTING.md >$work/text.txt
    set -- --base $work/dense --adapter examples/smollm2/adapter --text $work/text.txt "$@"
fi
exec "$python" -m vllm_dms demo --logs build/demo "$@"
