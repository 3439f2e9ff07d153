"""RoPE in plain PyTorch, in the variants of config.json, computed as vLLM computes them.

Part of the reference. vLLM differs from transformers in one: `dynamic` does not follow the length
of the text.
"""

import math

import torch

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_parameters(config: dict) -> dict:
    """What config.json says of RoPE, in either of transformers' spellings, in the newer one."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] not in KINDS:
        raise ValueError(
            f"rope_type is {rope['rope_type']!r}: the reference knows {', '.join(KINDS)}."
        )
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor is set: the reference rotates whole heads only.")
    return rope


def rope_frequencies(config: dict, head_dim: int) -> tuple[torch.Tensor, float]:
    """Angles per position (D / 2), and the factor of cosine and sine."""
    rope = rope_parameters(config)
    kind, theta = rope["rope_type"], rope["rope_theta"]
    positions = config.get("max_position_embeddings", 2048)
    if kind == "dynamic":
        trained = rope.get("max_trained_positions", positions)
        stretch = rope["factor"] * positions / trained - (rope["factor"] - 1)
        theta *= stretch ** (head_dim / (head_dim - 2))
    inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind == "linear":
        return inv_freq / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if kind == "yarn":
        return _yarn(inv_freq, rope, positions), _yarn_factor(rope)
    return inv_freq, 1.0


def _llama3(inv_freq: torch.Tensor, rope: dict) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones stay, a ramp joins them."""
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (keep + (1 - keep) / rope["factor"])


def _yarn(inv_freq: torch.Tensor, rope: dict, positions: int) -> torch.Tensor:
    """The same, with the ramp over channels, between those that turn beta_fast and beta_slow times
    in the original context."""
    half = len(inv_freq)
    original = rope.get("original_max_position_embeddings") or positions
    log_theta = math.log(rope["rope_theta"])
    low, high = (
        half * math.log(original / (turns * 2 * math.pi)) / log_theta
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    stretched = ((torch.arange(half) - low) / (high - low or 0.001)).clamp(0, 1)
    return inv_freq * (1 - stretched + stretched / rope["factor"])


def _yarn_factor(rope: dict) -> float:
    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return growth(rope["mscale"]) / growth(rope["mscale_all_dim"])
    return growth(1.0)
