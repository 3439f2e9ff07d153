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


GROUP = 64  # weights of a column that share a scale in 4 bits
ACTIVATIONS = 32.0  # no activation is larger
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # columns of eight, from the lowest bits of a word


def quantize_fp8(path: Path, out: Path) -> tuple[Path, Path]:
    """As llm-compressor writes FP8-dynamic -> that checkpoint, and one of the values it holds."""

    def rounded(weight):
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 448
        stored = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale": scale}, stored.float() * scale

    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**eight_bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**eight_bits, "strategy": "token", "dynamic": True},
    }
    method = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    return _quantize(path, out, rounded, method)


def quantize_modelopt(path: Path, out: Path) -> tuple[Path, Path]:
    """As Model-Optimizer writes FP8: a scale of each weight, here the same for all, because vLLM
    rounds projections that it stacks anew to a common one, and a fixed one for activations."""
    every = load_file(path / "model.safetensors")
    largest = max(w.abs().max() for name, w in every.items() if name.endswith("_proj.weight"))
    scale = largest.float() / 448

    def rounded(weight):
        stored = (weight / scale).to(torch.float8_e4m3fn)
        scales = {"weight_scale": scale.clone(), "input_scale": torch.tensor(ACTIVATIONS / 448)}
        return {"weight": stored, **scales}, stored.float() * scale

    method = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    return _quantize(path, out, rounded, method)


def quantize_gptq(path: Path, out: Path) -> tuple[Path, Path]:
    """Symmetric, in 4 bits, rows packed eight to a word -> as `quantize_fp8`."""

    def rounded(weight):
        columns = weight.T.reshape(-1, GROUP, weight.shape[0])  # [groups, GROUP, N]
        scale = _exact(columns.abs().amax(1, keepdim=True) / 7)
        q = ((columns / scale).round() + 8).clamp(0, 15)
        values = ((q - 8) * scale).flatten(0, 1).T
        q = q.flatten(0, 1).int()
        tensors = {
            "qweight": _pack(q.T.unflatten(1, (-1, 8))).T,
            "qzeros": torch.full((len(columns), weight.shape[0] // 8), 0x77777777).int(),
            "scales": scale[:, 0].half(),
            "g_idx": torch.arange(weight.shape[1]).int() // GROUP,
        }
        return tensors, values

    method = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
    return _quantize(path, out, rounded, {**method, "sym": True})


def quantize_awq(path: Path, out: Path) -> tuple[Path, Path]:
    """With zero points, in 4 bits, columns packed eight to a word -> as `quantize_fp8`."""

    def rounded(weight):
        columns = weight.T.reshape(-1, GROUP, weight.shape[0])
        low, high = columns.amin(1, keepdim=True), columns.amax(1, keepdim=True)
        scale = _exact((high - low) / 15)
        zero = (-low / scale).round().clamp(0, 15)
        q = ((columns / scale).round() + zero).clamp(0, 15)
        values = ((q - zero) * scale).flatten(0, 1).T
        order = list(AWQ_ORDER)
        tensors = {
            "qweight": _pack(q.flatten(0, 1).int().unflatten(1, (-1, 8))[..., order]),
            "qzeros": _pack(zero[:, 0].int().unflatten(1, (-1, 8))[..., order]),
            "scales": scale[:, 0].half(),
        }
        return tensors, values

    method = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}
    return _quantize(path, out, rounded, {**method, "version": "gemm"})


def _exact(scale: torch.Tensor) -> torch.Tensor:
    """To values that fp16 and bf16 both have."""
    return scale.clamp(min=1e-3).to(torch.bfloat16).float()


def _pack(q: torch.Tensor) -> torch.Tensor:
    """(..., 8) of 4 bits -> (...), the first in the lowest bits."""
    word = (q.long() << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(word >= 2**31, word - 2**32, word).int().contiguous()


def _quantize(path: Path, out: Path, rounded, method: dict) -> tuple[Path, Path]:
    weights = load_file(path / "model.safetensors")
    values = dict(weights)
    for name in [n for n in weights if n.endswith("_proj.weight")]:
        stem = name.removesuffix("weight")
        tensors, values[name] = rounded(weights.pop(name).float())
        weights |= {stem + kind: tensor.contiguous() for kind, tensor in tensors.items()}
        values[name] = values[name].contiguous()
    written = []
    for part, tensors, more in (
        ("quantized", weights, {"quantization_config": method}),
        ("values", values, {}),
    ):
        shutil.copytree(path, out / part)
        save_file(tensors, out / part / "model.safetensors", {"format": "pt"})
        config = json.loads((path / "config.json").read_text()) | more
        (out / part / "config.json").write_text(json.dumps(config))
        written.append(out / part)
    return written[0], written[1]
