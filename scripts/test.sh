#!/usr/bin/env bash
# test.sh [pytest arguments]: set up, then ruff, mypy and the tests. All of them run; all must pass.
# Runs on a CPU; tests marked `gpu` run too where there is an NVIDIA GPU.
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
say "pytest"
"$python" -m pytest -q "$@" || failed+=(pytest)

if [ ${#failed[@]} -gt 0 ]; then
    say "FAILED: $(IFS=,; echo "${failed[*]}")"
    exit 1
fi
say "all passed"
