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
from safetensors.torch import save_file

from vllm_dms.config import DMSConfig
from vllm_dms.reference import ReferenceModel

BYTES_END = len(SPECIAL) + 256  # token ids [3, 259) are the 256 bytes
ALPHA_SCALE, ALPHA_OFFSET = 100.0, 5.0
ALPHA_SPREAD = 0.3  # standard deviation of alpha; the threshold is offset / scale = 0.05
ATTENTION_GAIN = 1.5  # rms of the entries of q and k
LOGIT_GAIN = 2.5  # standard deviation of the output logits
CALIBRATION_TOKENS = 768
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
    config["model_type"] = "qwen3" if "Qwen3" in config["architectures"][0] else "llama"
    rule, metadata = _rule(dialect, window, evict_rate, alpha_per, disable_eviction)
    config |= rule | (extra_config or {})

    generator = torch.Generator().manual_seed(seed)
    weights = _random_weights(config, dialect, dtype, generator)
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


def _random_weights(config: dict, dialect: str, dtype: torch.dtype, generator) -> dict:
    """fp32 tensors whose values are exact in dtype"""
    hidden, d = config["hidden_size"], config["head_dim"]
    inner, heads = config["intermediate_size"], config["num_attention_heads"]
    kv_heads, qwen = config["num_key_value_heads"], config["model_type"] == "qwen3"
    reserved = slice(0, 1 + config["num_hidden_layers"] * kv_heads)
    if reserved.stop > hidden // 2:
        raise ValueError(f"hidden {hidden} is too small for {reserved.stop} reserved channels")

    def randn(rows: int, cols: int, gain: float) -> torch.Tensor:
        return gain * torch.randn(rows, cols, generator=generator)

    def spread_around(value: float, size: int) -> torch.Tensor:
        return value * (0.8 + 0.4 * torch.rand(size, generator=generator))

    # In Qwen3 the norms set the size of q and k; what comes before them must be different, so
    # that reading alpha on the wrong side of q_norm shows.
    qk_gain = (2.5 if qwen else ATTENTION_GAIN) / hidden**0.5
    embed = randn(config["vocab_size"], hidden, 1.0)
    embed[:, reserved] = torch.sign(embed[:, reserved])
    embed[:, 0] = 2.0
    weights = {
        "model.embed_tokens.weight": embed,
        "model.norm.weight": spread_around(1.0, hidden),
        "lm_head.weight": randn(config["vocab_size"], hidden, LOGIT_GAIN / hidden**0.5),
    }
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        weights |= {
            f"{p}.input_layernorm.weight": spread_around(1.0, hidden),
            f"{p}.post_attention_layernorm.weight": spread_around(1.0, hidden),
            f"{p}.self_attn.q_proj.weight": randn(heads * d, hidden, qk_gain),
            f"{p}.self_attn.k_proj.weight": randn(kv_heads * d, hidden, qk_gain),
            f"{p}.self_attn.v_proj.weight": randn(kv_heads * d, hidden, 2.0 / hidden**0.5),
            f"{p}.self_attn.o_proj.weight": randn(hidden, heads * d, 1.5 / (heads * d) ** 0.5),
            f"{p}.mlp.gate_proj.weight": randn(inner, hidden, 1 / hidden**0.5),
            f"{p}.mlp.up_proj.weight": randn(inner, hidden, 1 / hidden**0.5),
            f"{p}.mlp.down_proj.weight": randn(hidden, inner, 1 / inner**0.5),
        }
        weights[f"{p}.self_attn.o_proj.weight"][reserved] = 0
        weights[f"{p}.mlp.down_proj.weight"][reserved] = 0
        if qwen:
            weights[f"{p}.self_attn.q_norm.weight"] = spread_around(ATTENTION_GAIN, d)
            weights[f"{p}.self_attn.k_norm.weight"] = spread_around(ATTENTION_GAIN, d)
        if dialect == "nvidia-adapter":
            norm = spread_around(1.0, hidden)
            weights[f"{p}.self_attn.dms_proj_alpha_norm.weight"] = norm
            weights[f"{p}.self_attn.dms_proj_alpha.weight"] = torch.zeros(kv_heads, hidden)
    return {name: w.to(dtype).float() for name, w in weights.items()}


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
        for head in range(heads):
            gate = 1 + i * heads + head if min_margin > 0 else None
            row = _decision_row(features, size[head], rates[i, head].item(), gate, generator)
            if dms.adapter:
                weights[f"{layer}.self_attn.dms_proj_alpha.weight"][head] = row.to(dtype).float()
            else:
                last = (head * probe.group + 1) * probe.head_dim - 1
                weights[f"{layer}.self_attn.q_proj.weight"][last] = row.to(dtype).float()
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


def _decision_row(features, size, rate: float, gate: int | None, generator) -> torch.Tensor:
    """features (T, hidden), size (T) -> row (hidden) that evicts `rate` of the tokens."""
    row = torch.randn(features.shape[1], generator=generator)
    row[: features.shape[1] // 2] = 0  # covers every reserved channel
    row *= ALPHA_SPREAD / (features @ row / size).std()
    if gate is not None:
        row *= 0.05
        row[gate] = ALPHA_SPREAD / (features[:, gate] / size).abs().mean()
    # Evict iff features @ row + bias * features[:, 0] > threshold * size, solved for the bias.
    bias = (ALPHA_OFFSET / ALPHA_SCALE * size - features @ row) / features[:, 0]
    if gate is not None:
        evict = features[:, gate] > 0
        row[0] = (bias[evict].max() + bias[~evict].min()) / 2
        return row
    # In the first layer alpha depends on the token alone, so a quantile would be a token's exact
    # value: a tie. The middle of the widest gap nearby is clear of all of them.
    start = max(0, int(len(bias) * (rate - 0.015)))
    near = bias.sort().values[start:][: int(len(bias) * 0.03)]
    widest = near.diff().argmax()
    row[0] = (near[widest] + near[widest + 1]) / 2
    return row
