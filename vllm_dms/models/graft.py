"""From vLLM's model class to a DMS one: vLLM builds its model, then its attention is replaced.

Nothing of vLLM's constructors is repeated, so whatever they do for a family stays. In each decoder
layer three modules change: `input_layernorm` also hands on the hidden state before it,
`self_attn` reads a decision, and `self_attn.attn` is a `DMSAttention` under the old one's name.
"""

import functools
import importlib
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.v1.attention.backend import AttentionType

from vllm_dms.backend.attention import DMSAttention
from vllm_dms.backend.projection import Projection
from vllm_dms.backend.runtime import choose_ops
from vllm_dms.config import DMSConfig
from vllm_dms.models.attention import DMSSelfAttention, StreamNorm
from vllm_dms.models.decision import AlphaAdapter, BorrowedChannel, check_rounding, dms_config
from vllm_dms.models.families import Family
from vllm_dms.models.lora import refusing_q_proj
from vllm_dms.models.weights import DMSWeights


@functools.cache
def model_class(family: Family) -> type[nn.Module]:
    """vLLM's class of a family, grafted where the engine's config asks for DMS."""
    stock = getattr(importlib.import_module(family.module), family.architecture)
    return type(family.dms_architecture, (DMSModel, stock), {"__module__": "vllm_dms.models"})


class DMSModel(DMSWeights, nn.Module):
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = dms_config(vllm_config)
        self.expect_dms_weights(vllm_config, config)
        if config is not None:
            if vllm_config.lora_config and not config.adapter:
                self.packed_modules_mapping = refusing_q_proj(self.packed_modules_mapping)
            for layer in self.model.layers:
                if not isinstance(layer, PPMissingLayer):
                    graft_layer(layer, vllm_config, config)


def graft_layer(layer: nn.Module, vllm_config: VllmConfig, config: DMSConfig) -> None:
    """Replace what `DMSSelfAttention` needs replaced in a decoder layer of vLLM, just built."""
    attention = layer.self_attn
    refuse_special_attention(attention)
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
    attention.dms_qk_norm = hasattr(attention, "q_norm")
    device = torch.device(vllm_config.device_config.device_type)
    attention.dms_fused = choose_ops(config, device) == "triton" and is_plain(attention)
    if attention.dms_fused:
        attention.attn.set_projection(projection_of(attention))
    if config.adapter:
        attention.dms_source = adapter = AlphaAdapter(
            attention.total_num_kv_heads,
            attention.num_kv_heads,
            attention.hidden_size,
            layer.input_layernorm.variance_epsilon,
            config.alpha_per == "layer",
        )
        # The checkpoint's names for them, so that vLLM's own loading finds them.
        attention.dms_proj_alpha, attention.dms_proj_alpha_norm = adapter.proj, adapter.norm
    else:
        check_rounding(attention.qkv_proj)
        attention.dms_source = BorrowedChannel(
            attention.num_heads, attention.num_kv_heads, attention.head_dim, config
        )
    attention.__class__ = grafted(DMSSelfAttention, attention.__class__)
    layer.input_layernorm.__class__ = grafted(StreamNorm, layer.input_layernorm.__class__)


def is_plain(attention: Any) -> bool:
    """Whether norms and rotation are as in `backend.projection`."""
    rotary = attention.rotary_emb
    # Scaled or not, it is in the cache. A class with another forward rotates otherwise.
    forwards = ("forward_native", "forward_cuda", "forward_static")
    own = [getattr(type(rotary), name, None) for name in forwards]
    norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if attention.dms_qk_norm]
    return (
        own == [getattr(RotaryEmbedding, name) for name in forwards]
        and rotary.is_neox_style
        and rotary.rotary_dim == attention.head_dim
        and all(type(norm) is RMSNorm and norm.variance_size_override is None for norm in norms)
        and len({norm.variance_epsilon for norm in norms}) <= 1
    )


def projection_of(attention: Any) -> Projection:
    if not attention.dms_qk_norm:
        return Projection(None, None, 0.0, attention.rotary_emb)
    q_norm, k_norm = attention.q_norm, attention.k_norm
    return Projection(q_norm.weight, k_norm.weight, q_norm.variance_epsilon, attention.rotary_emb)


@functools.cache
def grafted(ours: Any, stock: Any) -> Any:
    """A class with the forward of ours and everything else of vLLM's."""
    return type(f"DMS{stock.__name__}", (ours, stock), {"__module__": __name__})


def refuse_special_attention(attention: nn.Module) -> None:
    """Raise for whatever vLLM built that the graft would drop: `DMSSelfAttention` is plain."""
    attn: Any = attention.attn
    special = {
        "bidirectional (is_causal is false)": attn.attn_type != AttentionType.DECODER,
        "dual chunk (dual_chunk_attention_config)": (
            getattr(attention, "dual_chunk_attention_config", None)
        ),
        "sliding-window": attn.sliding_window is not None,
        "with attention sinks": attn.has_sink,
        "with a KV cache shared between layers": attn.kv_sharing_target_layer_name,
        "with a logits soft cap": getattr(attn.impl, "logits_soft_cap", None),
        "with ALiBi": getattr(attn.impl, "alibi_slopes", None) is not None,
        "with queries scaled by position (llama_4_scaling)": (
            getattr(attention, "do_llama_4_scaling", False)
        ),
        f"of vLLM's class {type(attn).__name__}": type(attn) is not Attention,
    }
    for what, is_so in special.items():
        if is_so:
            raise ValueError(
                f"the model's attention is {what}, but DMS replaces plain causal attention only "
                f"({attn.layer_name}). Serve this model with --kv-cache-dtype auto."
            )
