"""What the model families share: an attention layer that reads a decision and passes it on."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config

from vllm_dms.backend.attention import DMSAttention
from vllm_dms.config import DMSConfig
from vllm_dms.models.decision import (
    AlphaAdapter,
    BorrowedChannel,
    check_dms_weights,
    dms_config,
    require_dms_weights,
)


def install_dms(attention: nn.Module, prefix: str, bias: bool, eps: float) -> None:
    """Turn vLLM's Qwen3 or Llama attention module, just built, into a DMS one.

    Its `attn` layer is replaced under the same name and the decision's source is added. Without
    DMS settings in the current config it stays as it is.
    """
    vllm_config: VllmConfig = get_current_vllm_config()
    config = dms_config(vllm_config)
    attention.dms_adapter = attention.dms_channel = None
    if config is None:
        return
    name = attention.attn.layer_name
    del vllm_config.compilation_config.static_forward_context[name]
    attention.attn = DMSAttention(
        attention.num_heads,
        attention.head_dim,
        attention.scaling,
        num_kv_heads=attention.num_kv_heads,
        cache_config=vllm_config.cache_config,
        quant_config=vllm_config.quant_config,
        prefix=name,
    )
    per_layer = config.alpha_per == "layer"
    if config.adapter:
        adapter = AlphaAdapter(
            attention.total_num_kv_heads,
            attention.num_kv_heads,
            attention.hidden_size,
            bias,
            eps,
            per_layer,
            prefix,
        )
        attention.dms_adapter = adapter
        attention.dms_proj_alpha = adapter.proj
        attention.dms_proj_alpha_norm = adapter.norm
    else:
        attention.dms_channel = BorrowedChannel(
            attention.num_heads, attention.num_kv_heads, attention.head_dim, per_layer
        )


def dms_forward(
    attention: nn.Module,
    positions: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    residual: torch.Tensor,
) -> torch.Tensor:
    """RoPE and attention of flat q, k, v (normed where the family norms them).

    ``residual`` [T, hidden] is the hidden state before `input_layernorm`.
    """
    if attention.dms_channel is not None:
        heads = q.view(-1, attention.num_heads, attention.head_dim)
        alpha, heads = attention.dms_channel.read(heads)
        q, k = attention.rotary_emb(positions, heads.flatten(1), k)
        heads = q.view(-1, attention.num_heads, attention.head_dim)
        q = attention.dms_channel.clear(heads).flatten(1)
        return attention.attn(q, k, v, alpha)
    q, k = attention.rotary_emb(positions, q, k)
    if attention.dms_adapter is None:
        return attention.attn(q, k, v)
    return attention.attn(q, k, v, attention.dms_adapter.read(residual))


def dms_layer_forward(
    layer: nn.Module,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder layer whose attention also sees the hidden state before `input_layernorm`."""
    if residual is None:
        residual = hidden_states
        hidden_states = layer.input_layernorm(hidden_states)
    else:
        hidden_states, residual = layer.input_layernorm(hidden_states, residual)
    hidden_states = layer.self_attn(positions, hidden_states, residual)
    hidden_states, residual = layer.post_attention_layernorm(hidden_states, residual)
    return layer.mlp(hidden_states), residual


class DMSWeights:
    """Mixin of the model classes: adapter weights are complete, wanted, or refused by name."""

    dms_config: DMSConfig | None
    # Until the checkpoint was loaded. Later calls may bring a few weights: vLLM updates in chunks.
    dms_weights_due: bool

    def set_dms_config(self, vllm_config: VllmConfig) -> None:
        self.dms_config = dms_config(vllm_config)
        self.dms_weights_due = vllm_config.load_config.load_format != "dummy"

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        checked = check_dms_weights(weights, self.dms_config)
        loaded = super().load_weights(checked)  # type: ignore[misc]
        if self.dms_weights_due:
            require_dms_weights(cast(nn.Module, self), loaded, self.dms_config)
            self.dms_weights_due = False
        return loaded
