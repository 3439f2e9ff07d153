"""DMS in plain PyTorch: the one truth that kernels, backend and engine are tested against.

Written to be read, not to be fast: no cache, no chunks, one dense masked forward per sequence.
Eviction is a pure function of the token prefix and visibility is causal, so one teacher-forced
forward gives the exact log-probabilities of every position, however the engine got there.

Glossary, used with the same meaning everywhere:
  i, j       positions of a query and of a key, j <= i
  window W   the last W + 1 tokens, the query's own included: always visible
  alpha      the number a token offers for a decision, one per KV head
  decision   d[t] = alpha[t] * scale - offset > 0: "evict"
  shift      whose decision counts: token j's fate is e[j] = d[j + shift]
  evicted    e[j]: key j disappears when it leaves the window
  visible    key j is visible to query i iff i - j <= W or not e[j]
  survivors  keys out of the window that were not evicted
  live       window + survivors: what a compact cache has to hold
  group      the query heads that share one KV head
  borrowed   alpha is the last channel of each group's first query head
  zero       whether that channel is 0 in attention: before RoPE, before and after (both), or never

Shapes: T tokens, L layers, Hq query heads, H KV heads, D head_dim. Time is the last axis of
decisions (..., T) and the second to last of q, k, v (heads, T, D).
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vllm_dms.adapter_paths import base_dir
from vllm_dms.adapters import (
    adapted_config,
    check_against_base,
    is_adapter_dir,
    read_adapter,
)
from vllm_dms.config import DMSConfig
from vllm_dms.rope import rope_frequencies


def decide(alpha: torch.Tensor, scale: float, offset: float) -> torch.Tensor:
    """alpha (...) -> bool (...). Rounded to alpha's dtype after each step, so that borderline
    values agree between implementations."""
    return (alpha * scale).sub(offset) > 0


def evicted(decisions: torch.Tensor, shift: int) -> torch.Tensor:
    """d (..., T) -> e (..., T). The newest `shift` tokens have no verdict yet and count as kept;
    they are inside any window."""
    return F.pad(decisions[..., shift:], (0, shift), value=False)


def visible(e: torch.Tensor, window: int, queries: torch.Tensor | None = None) -> torch.Tensor:
    """e (..., Tk), query positions (Tq) (default: every token) -> bool (..., Tq, Tk)."""
    keys = torch.arange(e.shape[-1], device=e.device)
    distance = (keys if queries is None else queries).unsqueeze(-1) - keys
    return (distance >= 0) & ((distance <= window) | ~e.unsqueeze(-2))


def live_counts(e: torch.Tensor, window: int) -> torch.Tensor:
    """e (..., T) -> int (...): keys that a compact cache holds after T tokens."""
    num_tokens = e.shape[-1]
    left_window = max(num_tokens - (window + 1), 0)
    return (~e[..., :left_window]).sum(-1) + min(num_tokens, window + 1)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """q (Hq, Tq, D), k and v (H, Tk, D), mask (H, Tq, Tk) -> (Hq, Tq, D), computed in fp32."""
    group = q.shape[0] // k.shape[0]
    k, v, mask = (x.repeat_interleave(group, dim=0) for x in (k, v, mask))
    scores = (q.float() @ k.float().mT) * scale
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return (weights @ v.float()).to(q.dtype)


def zero_borrowed(q: torch.Tensor, group: int) -> torch.Tensor:
    """q (Hq, T, D) with the borrowed channels taken out of attention."""
    q = q.clone()
    q[::group, :, -1] = 0
    return q


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """NeoX rotary embedding: x (heads, T, D); channel c is paired with channel c + D / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass(frozen=True)
class ReferenceOutput:
    logits: torch.Tensor  # (T, vocab), fp32
    evict: torch.Tensor  # (L, H, T) bool: e
    decision_logits: torch.Tensor  # (L, H, T) fp32: alpha * scale - offset; 0 in a dense model


class ReferenceModel:
    """A model of one of the families with the DMS mask; dms=None: the dense model.

    config: config.json; weights: the checkpoint's tensors by name. What families differ in (q_norm,
    biases, a tied lm_head, experts) is told from the weights."""

    def __init__(
        self,
        config: dict,
        weights: dict[str, torch.Tensor],
        dms: DMSConfig | None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        self.config, self.dms, self.dtype = config, dms, dtype
        self.weights = {name: w.to(device, dtype) for name, w in weights.items()}
        self.num_heads = config["num_attention_heads"]
        self.num_kv_heads = config.get("num_key_value_heads") or self.num_heads
        self.head_dim = config.get("head_dim") or config["hidden_size"] // self.num_heads
        self.group = self.num_heads // self.num_kv_heads
        self.inv_freq, self.rope_factor = rope_frequencies(config, self.head_dim)
        self.device = torch.device(device)

    @classmethod
    def from_dir(
        cls,
        path: Path | str,
        overrides: dict | None = None,
        adapter: Path | str | None = None,
        **kwargs,
    ):
        """A checkpoint's directory, with an adapter's over it if given, or an adapter's whose base
        is local; overrides as in --additional-config; kwargs: dtype, device."""
        path = Path(path)
        if adapter is None and is_adapter_dir(path):
            adapter = path
            path = base_dir(read_adapter(path))
        config = json.loads((path / "config.json").read_text())
        extra = path / "dms_metadata.json"
        metadata = json.loads(extra.read_text()) if extra.exists() else None
        weights: dict[str, torch.Tensor] = {}
        for shard in sorted(path.glob("*.safetensors")):
            weights |= load_file(shard)
        if adapter is not None:
            grafted = read_adapter(adapter)
            check_against_base(grafted, config)
            config = adapted_config(grafted, config)
            weights |= grafted.tensors
        dms = DMSConfig.from_checkpoint(config, metadata, overrides)
        return cls(config, weights, dms, **kwargs)

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm, statistics in fp32; the identity where the model has no such norm."""
        weight = self.weights.get(f"{name}.weight")
        if weight is None:
            return x
        scale = x.float().pow(2).mean(-1, keepdim=True).add(self.config["rms_norm_eps"]).rsqrt()
        return weight * (x.float() * scale).to(x.dtype)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(T, heads * D) -> (heads, T, D)"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

    def alpha(self, dms: DMSConfig, layer: str, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """x (T, hidden): the layer's input before its norm; q (Hq, T, D): after q_norm, before
        RoPE -> (H, T)"""
        if dms.adapter:
            normed = self.norm(x, f"{layer}.self_attn.dms_proj_alpha_norm")
            alpha = self.linear(normed, f"{layer}.self_attn.dms_proj_alpha").T
        else:
            alpha = q[:: self.group, :, -1]
        return alpha[:1].expand_as(alpha) if dms.alpha_per == "layer" else alpha

    def attend(self, layer: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        """x (T, hidden) -> attention block's output (T, hidden), e (H, T), its logits (H, T)"""
        attn, dms = f"{layer}.self_attn", self.dms
        h = self.norm(x, f"{layer}.input_layernorm")
        q = self.norm(self.heads(self.linear(h, f"{attn}.q_proj")), f"{attn}.q_norm")
        k = self.norm(self.heads(self.linear(h, f"{attn}.k_proj")), f"{attn}.k_norm")
        v = self.heads(self.linear(h, f"{attn}.v_proj"))

        logits = torch.zeros(self.num_kv_heads, len(x), device=self.device)
        e = torch.zeros_like(logits, dtype=torch.bool)
        if dms is not None:
            alpha = self.alpha(dms, layer, x, q)
            logits = alpha.float() * dms.alpha_scale - dms.alpha_offset
            if dms.evict:
                e = evicted(decide(alpha, dms.alpha_scale, dms.alpha_offset), dms.shift)

        zero = "never" if dms is None or dms.adapter else dms.zero
        if zero != "never":
            q = zero_borrowed(q, self.group)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if zero == "both":  # RoPE has mixed the paired channel back in
            q = zero_borrowed(q, self.group)

        mask = visible(e, dms.window if dms is not None else 0)
        out = attention(q, k, v, mask, self.head_dim**-0.5)
        return self.linear(out.transpose(0, 1).flatten(1), f"{attn}.o_proj"), e, logits

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x (T, hidden) -> (T, hidden); where there is a router, the sum over each token's best."""
        if f"{name}.gate.weight" not in self.weights:
            gate = F.silu(self.linear(x, f"{name}.gate_proj"))
            return self.linear(gate * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")
        shares = self.linear(x, f"{name}.gate").float().softmax(-1)
        best, experts = shares.topk(self.config["num_experts_per_tok"])
        if self.config.get("norm_topk_prob", False):
            best = best / best.sum(-1, keepdim=True)
        shares = torch.zeros_like(shares).scatter(-1, experts, best).to(x.dtype)
        outs = [self.mlp(f"{name}.experts.{e}", x) for e in range(shares.shape[-1])]
        return sum(share[:, None] * out for share, out in zip(shares.T, outs, strict=True))

    @torch.inference_mode()
    def forward(self, token_ids: list[int] | torch.Tensor) -> ReferenceOutput:
        """token_ids (T) -> logits that follow each token, and who was evicted."""
        ids = torch.as_tensor(token_ids, dtype=torch.long, device=self.device)
        angles = torch.outer(torch.arange(len(ids)).float(), self.inv_freq).repeat(1, 2)
        cos, sin = (self.rope_factor * part for part in (angles.cos(), angles.sin()))
        cos, sin = cos.to(self.device, self.dtype), sin.to(self.device, self.dtype)

        x = self.weights["model.embed_tokens.weight"][ids]
        evict, decision_logits = [], []
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            out, e, logits = self.attend(layer, x, cos, sin)
            evict.append(e)
            decision_logits.append(logits)
            x = x + out
            x = x + self.mlp(f"{layer}.mlp", self.norm(x, f"{layer}.post_attention_layernorm"))

        tied = "lm_head.weight" not in self.weights
        x = self.norm(x, "model.norm")
        logits = self.linear(x, "model.embed_tokens" if tied else "lm_head")
        return ReferenceOutput(logits.float(), torch.stack(evict), torch.stack(decision_logits))

    def logits(self, token_ids: list[int] | torch.Tensor) -> torch.Tensor:
        """token_ids (T) -> (T, vocab), fp32"""
        return self.forward(token_ids).logits
