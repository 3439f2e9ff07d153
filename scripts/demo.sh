#!/usr/bin/env bash
# demo.sh: set up, then `vllm-dms demo`: serve the embedded checkpoint and ask it about several
# thousand tokens, with and without eviction. Uses an NVIDIA GPU if there is one, else the CPU. About
# two minutes after the first set-up; the servers' logs go to build/demo.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)
exec "$python" -m vllm_dms demo --logs build/demo "$@"
