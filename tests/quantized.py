"""A checkpoint's linear layers in int8, as llm-compressor writes W8A8."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def quantize_int8(path: Path, out: Path, keep: tuple[str, ...] = ()) -> Path:
    """Weights rounded per output channel, activations per token when they come. ``keep``: the
    projections to be left as they are; the head always is."""
    shutil.copytree(path, out, dirs_exist_ok=True)
    weights = load_file(path / "model.safetensors")
    for name in [n for n in weights if n.endswith("_proj.weight")]:
        if name.split(".")[-2] in keep:
            continue
        scale = weights[name].abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
        weights[name + "_scale"] = scale
        weights[name] = (weights[name] / scale).round().clamp(-128, 127).to(torch.int8)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    eight_bits = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *(f"re:.*{proj}$" for proj in keep)],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
            }
        },
    }
    (out / "config.json").write_text(json.dumps(config))
    return out
