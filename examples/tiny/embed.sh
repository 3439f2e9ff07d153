#!/usr/bin/env bash
# Makes what build_tiny.sh left in WORK the embedded checkpoint, and its hash that of the README.
#   examples/tiny/embed.sh WORK
# The README's figures (training/quality.json) and times (the summaries) are written by hand.
set -euo pipefail
work=$1
tiny=$(dirname "${BASH_SOURCE[0]}")/../../vllm_dms/assets/tiny
find "$work/dms" -maxdepth 1 -type f -exec cp {} "$tiny" \;
for name in dense dms; do
    label=${name/dms/retrofit}
    cp "$work/$name/training/log.jsonl" "$tiny/training/$label.jsonl"
    cp "$work/$name/training/summary.json" "$tiny/training/$label.json"
done
cp "$work/dms/training/curves.png" "$tiny/training/"
sed "s|\"model\": \".*\"|\"model\": \"WORK/dms\"|" "$work/quality.json" >"$tiny/training/quality.json"
hash=$(sha256sum <"$tiny/model.safetensors" | cut -d' ' -f1)
sed -i -E "s/(sha256 \`)[0-9a-f]{64}/\1$hash/" "$tiny/README.md"
echo "$tiny: sha256 $hash"
