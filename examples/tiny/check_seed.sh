#!/usr/bin/env bash
# Does the seed decide every byte? Trains again what build_tiny.sh left in WORK and compares.
#   examples/tiny/check_seed.sh dense WORK [tiny|smoke]              once more, with WORK/dense
#   examples/tiny/check_seed.sh retrofit WORK [tiny|smoke]           once more, with WORK/dms
#   examples/tiny/check_seed.sh retrofit WORK [tiny|smoke] STEPS     two short ones, with each other
# Prints both hashes; exits with 1 if they differ. Leaves the second run, and the log of each, in
# WORK/check-dense, WORK/check-retrofit.
set -euo pipefail
what=$1 work=$2 preset=${3:-tiny} steps=${4:-}
python=${PYTHON:-python3}
source "$(dirname "${BASH_SOURCE[0]}")/presets.sh"
check=$work/check-$what
rm -rf "$check"

retrofit() { # OUT
    "$python" -m vllm_dms.retrofit "$work/dense" --data "$work/data.jsonl" --out "$1" "${recipe[@]}" \
        ${steps:+--steps "$steps"} || [ $? = 1 ] # a short one may miss its ratio
}

case $what in
    dense)
        first=$work/dense second=$check
        "$python" -m examples.tiny.train_dense --preset "$preset" --out "$second"
        ;;
    retrofit)
        first=$work/dms second=$check/second
        if [ -n "$steps" ]; then
            first=$check/first
            retrofit "$first"
        fi
        retrofit "$second"
        ;;
    *) echo "check_seed.sh: $what is neither dense nor retrofit" >&2; exit 2 ;;
esac
rm -f "$check"/training/state.pt "$check"/*/training/state.pt
sha256sum "$first/model.safetensors" "$second/model.safetensors"
if cmp "$first/model.safetensors" "$second/model.safetensors"; then
    echo "== $what: the same bytes"
else
    echo "== $what: DIFFERENT bytes"
    exit 1
fi
