"""Random weights of a family, before its decisions are calibrated (`checkpoints`)."""

import torch

from vllm_dms.models.families import Family

ATTENTION_GAIN = 1.5  # rms of the entries of q and k
LOGIT_GAIN = 2.5  # standard deviation of the output logits


class Random:
    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, *shape: int, gain: float) -> torch.Tensor:
        return gain * torch.randn(*shape, generator=self.generator)

    def around(self, value: float, size: int) -> torch.Tensor:
        return value * (0.8 + 0.4 * torch.rand(size, generator=self.generator))


def random_weights(
    config: dict, family: Family, dialect: str, dtype: torch.dtype, generator: torch.Generator
) -> dict:
    """fp32 tensors whose values are exact in dtype. No layer writes to the reserved channels of the
    hidden state: channel 0, and one for each layer and KV head."""
    hidden, kv_heads = config["hidden_size"], config["num_key_value_heads"]
    reserved = slice(0, 1 + config["num_hidden_layers"] * kv_heads)
    if reserved.stop > hidden // 2:
        raise ValueError(f"hidden {hidden} is too small for {reserved.stop} reserved channels")
    random = Random(generator)
    embed = random.normal(config["vocab_size"], hidden, gain=1.0)
    embed[:, reserved] = torch.sign(embed[:, reserved])
    embed[:, 0] = 2.0
    weights = {"model.embed_tokens.weight": embed}
    tied = config["tie_word_embeddings"]
    weights["model.norm.weight"] = random.around(LOGIT_GAIN / hidden**0.5 if tied else 1.0, hidden)
    if not tied:
        head = random.normal(config["vocab_size"], hidden, gain=LOGIT_GAIN / hidden**0.5)
        weights["lm_head.weight"] = head
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        weights[f"{layer}.input_layernorm.weight"] = random.around(1.0, hidden)
        weights[f"{layer}.post_attention_layernorm.weight"] = random.around(1.0, hidden)
        weights |= _attention(f"{layer}.self_attn", config, family, random)
        if family.moe:
            weights[f"{layer}.mlp.gate.weight"] = random.normal(
                config["num_experts"], hidden, gain=2 / hidden**0.5
            )
            for e in range(config["num_experts"]):
                size = config["moe_intermediate_size"]
                weights |= _mlp(f"{layer}.mlp.experts.{e}", hidden, size, random)
        else:
            weights |= _mlp(f"{layer}.mlp", hidden, config["intermediate_size"], random)
        if dialect == "nvidia-adapter":
            alpha = f"{layer}.self_attn.dms_proj_alpha"
            weights[f"{alpha}_norm.weight"] = random.around(1.0, hidden)
            weights[f"{alpha}.weight"] = torch.zeros(kv_heads, hidden)
            if config["attention_bias"]:
                weights[f"{alpha}.bias"] = random.normal(kv_heads, gain=0.2)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "o_proj.bias", "down_proj.weight")):
            weight[reserved] = 0
    return {name: w.to(dtype).float() for name, w in weights.items()}


def _attention(name: str, config: dict, family: Family, random: Random) -> dict:
    hidden, d = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    # Where norms set the size of q and k, what comes before them must be different, so that
    # reading alpha on the wrong side of q_norm shows.
    qk_gain = (2.5 if family.qk_norm else ATTENTION_GAIN) / hidden**0.5
    weights = {
        f"{name}.q_proj.weight": random.normal(heads * d, hidden, gain=qk_gain),
        f"{name}.k_proj.weight": random.normal(kv_heads * d, hidden, gain=qk_gain),
        f"{name}.v_proj.weight": random.normal(kv_heads * d, hidden, gain=2.0 / hidden**0.5),
        f"{name}.o_proj.weight": random.normal(hidden, heads * d, gain=1.5 / (heads * d) ** 0.5),
    }
    if family.qkv_bias == "always" or config["attention_bias"]:
        for proj, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            weights[f"{name}.{proj}_proj.bias"] = random.normal(rows * d, gain=0.5)
    if family.qk_norm:
        weights[f"{name}.q_norm.weight"] = random.around(ATTENTION_GAIN, d)
        weights[f"{name}.k_norm.weight"] = random.around(ATTENTION_GAIN, d)
    elif config["attention_bias"]:  # vLLM has an o_proj.bias in Llama and its kin only
        weights[f"{name}.o_proj.bias"] = random.normal(hidden, gain=0.2)
    return weights


def _mlp(name: str, hidden: int, inner: int, random: Random) -> dict:
    return {
        f"{name}.gate_proj.weight": random.normal(inner, hidden, gain=1 / hidden**0.5),
        f"{name}.up_proj.weight": random.normal(inner, hidden, gain=1 / hidden**0.5),
        f"{name}.down_proj.weight": random.normal(hidden, inner, gain=1 / inner**0.5),
    }
