"""Make a DMS checkpoint of a published shape: random weights, chosen eviction rates.

    python benchmarks/synthetic.py Qwen3-8B --out /tmp/qwen3-8b [--rates uniform] [--layers 4]

Speed and memory do not depend on what the weights say, except through which tokens are evicted;
that is what is set here, head by head. The output holds two checkpoints over the same weights:

    OUT/dms     for --kv-cache-dtype dms and dms_fp8. Decisions borrow a query channel, as in
                nvidia/Qwen3-8B-DMS-8x; with --dialect nvidia-adapter they have own weights
    OUT/dense   the published architecture without the decisions, for stock vLLM

How the rate is set: embeddings are random but for channel 0, which is 1 for every token, and layers
add little to them and nothing to channel 0. After RMSNorm a token is thus a Gaussian vector x and a
constant, and a decision's row (bias, w) evicts it with probability Phi((bias - offset/scale)/|w|).
The text that such a model writes is noise: sample with temperature 1, or it repeats one token.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist

import torch
from safetensors.torch import save_file
from shapes import MAX_POSITION, SHAPES, number_tokenizer

ALPHA_SCALE, ALPHA_OFFSET = 100.0, 5.0
ALPHA_SPREAD = 0.3  # |w|: standard deviation of alpha over tokens
LAYER_GAIN = 0.03  # rms of what attention or MLP adds to a residual stream of rms 1
TAIL = 1.2  # standard deviation of log keep over heads: live lengths differ by about 10x
LAYERS_PER_SHARD = 4
DIALECTS = ("nvidia-borrowed", "nvidia-adapter")


def head_keep_rates(layers: int, heads: int, mean: float, rates: str, seed: int) -> torch.Tensor:
    """-> (L, H) share of tokens that each head keeps past its window; ``mean`` on average"""
    if rates == "uniform":
        return torch.full((layers, heads), mean)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.exp(TAIL * torch.randn(layers, heads, generator=generator))
    low, high = 0.0, 1.0 / weight.mean().item()
    for _ in range(60):  # the factor at which the clamped rates have the mean asked for
        factor = (low + high) / 2
        too_small = (factor * weight).clamp(0.002, 0.98).mean() < mean
        low, high = (factor, high) if too_small else (low, factor)
    return (factor * weight).clamp(0.002, 0.98)


class _Maker:
    def __init__(self, shape: dict, keep: torch.Tensor, seed: int, dialect: str) -> None:
        self.shape, self.keep, self.dialect = shape, keep, dialect
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def randn(self, rows: int, cols: int, std: float, silent: bool = False) -> torch.Tensor:
        """``silent``: leaves the constant channel of the residual stream alone"""
        w = torch.empty(rows, cols, dtype=torch.bfloat16, device=self.device)
        w.normal_(0.0, std, generator=self.generator)
        if silent:
            w[0] = 0
        return w

    def ones(self, size: int, value: float = 1.0) -> torch.Tensor:
        return torch.full((size,), value, dtype=torch.bfloat16, device=self.device)

    def ends(self) -> dict[str, torch.Tensor]:
        hidden, vocab = self.shape["hidden_size"], self.shape["vocab_size"]
        embed = self.randn(vocab, hidden, 1.0)
        embed[:, 0] = 1.0
        if self.shape["tie_word_embeddings"]:
            # A token's own logit is hidden times this: keep it far from certain.
            head, norm = {}, 5.0 / hidden
        else:
            head, norm = {"lm_head.weight": self.randn(vocab, hidden, hidden**-0.5)}, 1.0
        ends = {"model.embed_tokens.weight": embed, "model.norm.weight": self.ones(hidden, norm)}
        return ends | head

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        shape = self.shape
        hidden, d = shape["hidden_size"], shape["head_dim"]
        q_size, kv_size = shape["num_attention_heads"] * d, shape["num_key_value_heads"] * d
        unit, out = hidden**-0.5, LAYER_GAIN
        weights = {
            "input_layernorm": self.ones(hidden),
            "post_attention_layernorm": self.ones(hidden),
            "self_attn.q_proj": self.randn(q_size, hidden, unit),
            "self_attn.k_proj": self.randn(kv_size, hidden, unit),
            "self_attn.v_proj": self.randn(kv_size, hidden, unit),
            "self_attn.o_proj": self.randn(hidden, q_size, out * q_size**-0.5, silent=True),
        }
        if "num_experts" in shape:
            weights["mlp.gate"] = self.randn(shape["num_experts"], hidden, unit)
            for expert in range(shape["num_experts"]):
                weights |= self.mlp(f"mlp.experts.{expert}", shape["moe_intermediate_size"])
        else:
            weights |= self.mlp("mlp", shape["intermediate_size"])
        if shape["model_type"].startswith("qwen3"):
            weights |= {f"self_attn.{name}_norm": self.ones(d) for name in "qk"}
        if self.dialect == "nvidia-borrowed":
            # The last channel of each group's first query head. The other channels' rms is 1, so
            # that q_norm leaves this one about as it is.
            q_heads = weights["self_attn.q_proj"].view(-1, d, hidden)
            q_heads[:: q_size // kv_size, -1] = self.decision_rows(index)
        return {f"model.layers.{index}.{name}.weight": w for name, w in weights.items()}

    def mlp(self, name: str, inner: int) -> dict[str, torch.Tensor]:
        hidden, out = self.shape["hidden_size"], LAYER_GAIN * inner**-0.5
        return {
            f"{name}.gate_proj": self.randn(inner, hidden, hidden**-0.5),
            f"{name}.up_proj": self.randn(inner, hidden, hidden**-0.5),
            f"{name}.down_proj": self.randn(hidden, inner, out, silent=True),
        }

    def decision_rows(self, index: int) -> torch.Tensor:
        """-> (H, hidden) of layer ``index``: alpha is their product with a token after RMSNorm"""
        rates, hidden = self.keep[index].tolist(), self.shape["hidden_size"]
        rows = torch.randn(len(rates), hidden, generator=self.generator, device=self.device)
        rows[:, 0] = 0
        rows *= ALPHA_SPREAD / rows.norm(dim=1, keepdim=True)
        for row, keep in zip(rows, rates, strict=True):
            row[0] = ALPHA_OFFSET / ALPHA_SCALE + ALPHA_SPREAD * NormalDist().inv_cdf(1 - keep)
        return rows.to(torch.bfloat16)

    def adapters(self) -> dict[str, torch.Tensor]:
        weights = {}
        for index in range(len(self.keep)):
            attn = f"model.layers.{index}.self_attn"
            weights[f"{attn}.dms_proj_alpha.weight"] = self.decision_rows(index)
            weights[f"{attn}.dms_proj_alpha_norm.weight"] = self.ones(self.shape["hidden_size"])
        return weights


def make_checkpoint(
    out: Path,
    name: str,
    shape: dict,
    *,
    dialect: str = DIALECTS[0],
    rates: str = "heavy",
    keep: float = 0.126,
    window: int = 512,
    seed: int = 0,
) -> dict:
    """Writes OUT/dms and OUT/dense; returns what synthetic.json records."""
    layers = shape["num_hidden_layers"]
    keep_rates = head_keep_rates(layers, shape["num_key_value_heads"], keep, rates, seed)
    config = {
        **shape,
        "max_position_embeddings": MAX_POSITION,
        "attention_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": shape["vocab_size"] - 1,
    }
    rule = {
        "architectures": [f"{shape['architectures'][0]}DMS"],
        "dms_window_size": window,
        "dms_alpha_scale": ALPHA_SCALE,
        "dms_initial_alpha_offset": ALPHA_OFFSET,
        "dms_cr": round(1 / keep),
        "dms_alpha_per": "head",
        "dms_separate_alpha": dialect == "nvidia-adapter",
    }
    dms, dense = out / "dms", out / "dense"
    for path in (dms, dense):
        path.mkdir(parents=True, exist_ok=True)
        for old in path.glob("*.safetensors*"):
            old.unlink()
    index = _write_weights(dms, _Maker(shape, keep_rates, seed, dialect))
    dense_index = {name: file for name, file in index.items() if "dms_" not in name}
    for file in sorted(set(dense_index.values())):
        (dense / file).symlink_to(Path("..") / "dms" / file)
    _write_configs(dms, config | rule, index)
    _write_configs(dense, config, dense_index)
    tokenizer = number_tokenizer(shape["vocab_size"])
    record = {"shape": name, "layers": layers, "dialect": dialect, "window": window, "rates": rates}
    record |= {"mean_keep": keep_rates.mean().item(), "seed": seed}
    record["keep"] = [[round(k, 5) for k in row] for row in keep_rates.tolist()]
    for path in (dms, dense):
        tokenizer.save_pretrained(path)
        (path / "synthetic.json").write_text(json.dumps(record))
    return record


def _shards(maker: _Maker) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    layers = range(maker.shape["num_hidden_layers"])
    groups = [layers[i : i + LAYERS_PER_SHARD] for i in layers[::LAYERS_PER_SHARD]]
    names = (f"model-{i:05}-of-{len(groups) + 1:05}.safetensors" for i in itertools.count(1))
    yield next(names), maker.ends()
    for group in groups:
        yield next(names), {name: w for i in group for name, w in maker.layer(i).items()}
    if maker.dialect == "nvidia-adapter":
        yield "adapter.safetensors", maker.adapters()


def _write_weights(path: Path, maker: _Maker) -> dict[str, str]:
    """-> file of each tensor. Shards are written while the next ones are made."""
    index: dict[str, str] = {}
    pending: list[Future] = []
    with ThreadPoolExecutor(3) as pool:
        for file, weights in _shards(maker):
            index |= dict.fromkeys(weights, file)
            on_host = {name: w.cpu().contiguous() for name, w in weights.items()}
            pending.append(pool.submit(save_file, on_host, path / file, metadata={"format": "pt"}))
            if len(pending) > 3:
                pending.pop(0).result()
        for future in pending:
            future.result()
    return index


def _write_configs(path: Path, config: dict, index: dict[str, str]) -> None:
    content = {"metadata": {}, "weight_map": dict(sorted(index.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(content))
    (path / "config.json").write_text(json.dumps(config, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="fewer layers than the published model")
    parser.add_argument("--dialect", choices=DIALECTS, default=DIALECTS[0])
    parser.add_argument("--rates", choices=("uniform", "heavy"), default="heavy")
    parser.add_argument("--keep", type=float, default=0.126, help="mean share kept past the window")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = dict(SHAPES[args.shape])
    if args.layers:
        shape["num_hidden_layers"] = args.layers
    options = {key: getattr(args, key) for key in ("dialect", "rates", "keep", "window", "seed")}
    record = make_checkpoint(args.out, args.shape, shape, **options)
    print(f"{args.out}: {record['layers']} layers, mean keep {record['mean_keep']:.4f}")


if __name__ == "__main__":
    main()
