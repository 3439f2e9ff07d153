#!/usr/bin/env bash
# test.sh [pytest arguments]: set up, then ruff, mypy and the tests. All of them run; all must pass.
# Runs on a CPU; tests marked `gpu` run too where there is an NVIDIA GPU. Without arguments the tests
# of what touches vLLM run once more with each other supported version of it, downloaded from PyPI:
# see vllm_sources.py.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)
failed=()

say() { echo "test: $*"; }

check() { # MODULE ARGUMENTS...
    # An environment that setup.sh found rather than made may lack the tools.
    if "$python" -c "import $1" 2>/dev/null; then
        say "$*"
        "$python" -m "$@" || failed+=("$1 ${2:-}")
    else
        say "NOT CHECKED: $1 is not installed in this environment"
    fi
}

check ruff check --output-format concise .
check ruff format --check --output-format concise .
check mypy
# Files of tests side by side, where no GPU has to be shared and no test is asked for by itself.
parallel=()
if [ $# = 0 ] && ! nvidia-smi -L 2>/dev/null | grep -q '^GPU' && "$python" -c 'import xdist' 2>/dev/null; then
    parallel=(-n 2 --dist loadfile)
fi
say "pytest ${parallel[*]}"
"$python" -m pytest -q "${parallel[@]}" "$@" || failed+=(pytest)

# What touches nothing of vLLM, or is the same with each version and takes long.
unrelated=(adapter addresses benchmark command compile config copies demo_chat dense deployment docs families fastdms
    flash golden kernels launch multi_turn needles overlap peers processes project ptx quality quantized reference report
    retrofit rounding seed server smollm2 snapshots storage synthetic tiny torch_ops triton_ops verify warm_up weights
    wheel)
ignored=("${unrelated[@]/#/--ignore-glob=tests/test_}")
ignored=("${ignored[@]/%/*.py}")

test_version() { # VERSION
    local sources
    say "vLLM $1: the tests of what touches it"
    if ! "$python" -c 'import importlib.metadata as m, sys; sys.exit("cpu" not in m.version("vllm"))'; then
        say "NOT CHECKED: only beside vLLM for CPU are another version's sources enough to run"
    elif ! sources=$("$python" scripts/vllm_sources.py "$1"); then
        failed+=("sources of vLLM $1")
    else
        PYTHONPATH=$sources "$python" -m pytest -q "${parallel[@]}" "${ignored[@]}" || failed+=("vLLM $1")
    fi
}

if [ $# = 0 ]; then
    for version in $("$python" -c 'import importlib.metadata as m
from vllm_dms.compat import TESTED_VERSIONS
print(*{*TESTED_VERSIONS} - {m.version("vllm").split("+")[0]})'); do
        test_version "$version"
    done
fi

if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: $(IFS=,; echo "${failed[*]}")"
    exit 1
fi
say "all passed"
