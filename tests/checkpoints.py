"""Random DMS checkpoints that are small, loadable by vLLM, and hard to get right by accident.

- attention logits have a spread of about 2, values are strong and the head is untied: who is
  visible decides what comes next;
- hidden channel 0 holds the same constant for every token and no layer writes to it: a bias for
  decisions that survives RMSNorm, so eviction rates can be calibrated exactly, head by head;
- with min_margin, one more such channel per (layer, head) holds +1 or -1 by token: decisions
  then stay clear of the threshold and agree between implementations in bf16, too.
"""

import json
from pathlib import Path

import torch
from byte_tokenizer import SPECIAL, byte_tokenizer
from random_weights import random_weights
from safetensors.torch import save_file

from vllm_dms.config import DMSConfig
from vllm_dms.models.families import family_of_architectures
from vllm_dms.reference import ReferenceModel

BYTES_END = len(SPECIAL) + 256  # token ids [3, 259) are the 256 bytes
ALPHA_SCALE, ALPHA_OFFSET = 100.0, 5.0
ALPHA_SPREAD = 0.3  # standard deviation of alpha; the threshold is offset / scale = 0.05
CALIBRATION_TOKENS = 768
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Arguments of `make_checkpoint` for every kind of decision.
DIALECTS = {
    "borrowed": {"dialect": "nvidia-borrowed"},
    "adapter": {"dialect": "nvidia-adapter"},
    "per-layer": {"dialect": "nvidia-borrowed", "alpha_per": "layer"},
    "adapter-per-layer": {"dialect": "nvidia-adapter", "alpha_per": "layer"},
    "fastdms": {"dialect": "fastdms"},
    "llama-adapter": {"dialect": "nvidia-adapter", "arch": "LlamaForCausalLM"},
    "disabled": {"dialect": "nvidia-borrowed", "disable_eviction": True},
}
DEFAULT_ARCH = {
    "dense": "Qwen3ForCausalLM",
    "nvidia-borrowed": "Qwen3ForCausalLM",
    "nvidia-adapter": "Qwen3ForCausalLMDMS",
    "fastdms": "LlamaForCausalLM",
}


def random_tokens(count: int, seed: int) -> list[int]:
    """Token ids that the tokenizer can spell."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), BYTES_END, (count,), generator=generator).tolist()


def adapter_weights(num_layers: int) -> set[str]:
    """Names of the tensors that an adapter without biases adds."""
    suffixes = ("dms_proj_alpha.weight", "dms_proj_alpha_norm.weight")
    return {f"model.layers.{i}.self_attn.{s}" for i in range(num_layers) for s in suffixes}


def make_checkpoint(
    out_dir: Path | str,
    dialect: str = "nvidia-borrowed",
    *,
    seed: int = 0,
    arch: str | None = None,
    num_layers: int = 2,
    hidden: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    vocab: int = 320,
    window: int = 16,
    evict_rate: float = 0.875,
    heavy_tailed: bool = False,
    alpha_per: str = "head",
    disable_eviction: bool = False,
    min_margin: float = 0.0,
    dtype: torch.dtype = torch.float32,
    extra_config: dict | None = None,
) -> Path:
    """Writes config.json, model.safetensors, a tokenizer and FastDMS's metadata; returns the path.

    dialect: a DMSConfig dialect, or "dense" for the same model without DMS. arch: defaults to the
    dialect's own. heavy_tailed: heads keep very different shares, evict_rate on average.
    min_margin: least |alpha * scale - offset| over the calibration tokens (10 is within reach);
    0 gives continuous decisions. extra_config is merged into config.json."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [arch or DEFAULT_ARCH[dialect]],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        # A short wavelength even in the last channel: an unzeroed borrowed channel must show.
        "rope_theta": 1000.0,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "eos_token_id": SPECIAL.index("<|im_end|>"),
        "pad_token_id": 0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    family = family_of_architectures(config["architectures"])
    config["model_type"] = family.model_type
    if family.moe:
        config |= {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": hidden,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    rule, metadata = _rule(dialect, window, evict_rate, alpha_per, disable_eviction)
    config |= rule | (extra_config or {})

    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(config, family, dialect, dtype, generator)
    dms = DMSConfig.from_checkpoint(config, metadata)
    if dms is not None:
        rates = _head_rates(num_layers, num_kv_heads, evict_rate, heavy_tailed, generator)
        _calibrate(config, weights, dms, rates, min_margin, dtype, generator)
    weights = {name: w.to(dtype).contiguous() for name, w in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1))
    if metadata is not None:
        (out / "dms_metadata.json").write_text(json.dumps(metadata, indent=1))
    byte_tokenizer().save_pretrained(out)
    return out


def _rule(dialect: str, window: int, rate: float, alpha_per: str, disable: bool):
    """-> the DMS keys of config.json, the contents of dms_metadata.json or None"""
    if dialect == "dense":
        return {}, None
    ratio = round(1 / (1 - rate)) if rate < 1 else 1
    if dialect == "fastdms":
        alpha = {"alpha_scale": ALPHA_SCALE, "alpha_offset": ALPHA_OFFSET}
        return {}, {"window_size": window, **alpha, "target_cr": ratio}
    return {
        "dms_window_size": window,
        "dms_alpha_scale": ALPHA_SCALE,
        "dms_initial_alpha_offset": ALPHA_OFFSET,
        "dms_cr": ratio,
        "dms_alpha_per": alpha_per,
        "dms_disable_eviction": disable,
        "dms_separate_alpha": dialect == "nvidia-adapter",
    }, None


def _head_rates(layers: int, heads: int, rate: float, heavy: bool, generator) -> torch.Tensor:
    """-> (L, H) share of tokens to evict"""
    keep = torch.full((layers, heads), 1 - rate)
    if heavy and rate < 1:
        weight = torch.exp(1.2 * torch.randn(layers, heads, generator=generator))
        keep = (keep * weight / weight.mean()).clamp(0.01, 0.95)
    return 1 - keep


class _Probe(ReferenceModel):
    """Keeps what each layer's decision is computed from."""

    def alpha(self, dms, layer, x, q):
        self.inputs[layer] = x
        return super().alpha(dms, layer, x, q)


def _calibrate(config, weights, dms, rates, min_margin, dtype, generator) -> None:
    """Fills in, layer by layer, the weights that produce alpha. An earlier layer's evictions
    change a later layer's input, hence the order."""
    heads, num_layers = config["num_key_value_heads"], config["num_hidden_layers"]
    ids = torch.tensor(random_tokens(CALIBRATION_TOKENS, seed=12345))
    if min_margin > 0:
        # The sign channels follow the rates: the tokens to be evicted are exactly the +1 ones.
        for flat, rate in enumerate(rates.flatten().tolist()):
            evicted = torch.rand(config["vocab_size"], generator=generator).argsort() < round(
                rate * config["vocab_size"]
            )
            weights["model.embed_tokens.weight"][:, 1 + flat] = torch.where(evicted, 1.0, -1.0)
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        probe = _Probe({**config, "num_hidden_layers": i + 1}, weights, dms)
        probe.inputs = {}
        probe.forward(ids)
        features, size = _alpha_features(probe, layer, dms)
        proj = f"{layer}.self_attn." + ("dms_proj_alpha" if dms.adapter else "q_proj")
        for head in range(heads):
            gate = 1 + i * heads + head if min_margin > 0 else None
            out = head if dms.adapter else (head * probe.group + 1) * probe.head_dim - 1
            bias = weights[f"{proj}.bias"][out] if f"{proj}.bias" in weights else 0.0
            row = _decision_row(features, size[head], bias, rates[i, head].item(), gate, generator)
            weights[f"{proj}.weight"][out] = row.to(dtype).float()
    margin = ReferenceModel(config, weights, dms).forward(ids).decision_logits.abs().min().item()
    if margin < min_margin:
        raise ValueError(f"min_margin {min_margin} is out of reach: got {margin:.2f}")


def _alpha_features(probe: ReferenceModel, layer: str, dms: DMSConfig):
    """-> features (T, hidden), size (H, T) such that alpha = features @ row / size. The borrowed
    channel's own share in its head's rms is below 1 %, and left out."""
    x, attn = probe.inputs[layer], f"{layer}.self_attn"
    if dms.adapter:
        return probe.norm(x, f"{attn}.dms_proj_alpha_norm"), torch.ones(probe.num_kv_heads, len(x))
    h = probe.norm(x, f"{layer}.input_layernorm")
    q = probe.heads(probe.linear(h, f"{attn}.q_proj"))[:: probe.group].clone()
    if f"{attn}.q_norm.weight" not in probe.weights:
        return h, torch.ones(probe.num_kv_heads, len(x))
    q[..., -1] = 0
    return h, q.pow(2).mean(-1).sqrt() / probe.weights[f"{attn}.q_norm.weight"][-1]


def _decision_row(features, size, bias, rate: float, gate: int | None, generator) -> torch.Tensor:
    """features (T, hidden), size (T), the projection's bias -> row (hidden) that evicts `rate` of
    the tokens."""
    row = torch.randn(features.shape[1], generator=generator)
    row[: features.shape[1] // 2] = 0  # covers every reserved channel
    row *= ALPHA_SPREAD / (features @ row / size).std()
    if gate is not None:
        row *= 0.05
        row[gate] = ALPHA_SPREAD / (features[:, gate] / size).abs().mean()
    # Evict iff features @ row + first * features[:, 0] + bias > threshold * size, solved for first.
    first = (ALPHA_OFFSET / ALPHA_SCALE * size - features @ row - bias) / features[:, 0]
    if gate is not None:
        evict = features[:, gate] > 0
        row[0] = (first[evict].max() + first[~evict].min()) / 2
        return row
    # In the first layer alpha depends on the token alone, so a quantile would be a token's exact
    # value: a tie. The middle of the widest gap nearby is clear of all of them.
    start = max(0, int(len(first) * (rate - 0.015)))
    near = first.sort().values[start:][: int(len(first) * 0.03)]
    widest = near.diff().argmax()
    row[0] = (near[widest] + near[widest + 1]) / 2
    return row
