#!/usr/bin/env bash
# demo.sh: set up, then serve a small DMS checkpoint and ask it about several thousand tokens, with
# and without eviction. Uses an NVIDIA GPU if there is one, else the CPU. About two minutes after
# the first set-up; the servers are stopped however it ends.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(bash scripts/setup.sh)
exec "$python" scripts/demo.py
