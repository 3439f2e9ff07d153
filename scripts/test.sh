#!/usr/bin/env bash
# test.sh [pytest arguments]: set up, then ruff, mypy and the tests. All of it must pass.
# Runs on a CPU; tests marked `gpu` run too where there is an NVIDIA GPU.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)
say() { echo "test: $*"; }

check() { # MODULE ARGUMENTS...; an environment that setup.sh did not make may lack the tools
    if "$python" -c "import $1" 2>/dev/null; then
        say "$*"
        "$python" -m "$@"
    else
        say "NOT CHECKED: $1 is not installed in this environment"
    fi
}

check ruff check .
check ruff format --check .
check mypy
say "pytest"
"$python" -m pytest -q "$@"
