"""Qwen3 with DMS: vLLM's model, with a decision read in each attention layer."""

from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models import qwen3
from vllm.model_executor.models.utils import maybe_prefix
from vllm.transformers_utils.config import set_default_rope_theta

from vllm_dms.models.attention import DMSWeights, dms_forward, dms_layer_forward, install_dms


class DMSQwen3Attention(qwen3.Qwen3Attention):
    def __init__(self, *, prefix: str, rms_norm_eps: float, qkv_bias: bool, **kwargs: Any) -> None:
        super().__init__(prefix=prefix, rms_norm_eps=rms_norm_eps, qkv_bias=qkv_bias, **kwargs)
        install_dms(self, prefix, bias=qkv_bias, eps=rms_norm_eps)

    def forward(  # type: ignore[override]
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(1)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(1)
        output, _ = self.o_proj(dms_forward(self, positions, q, k, v, residual))
        return output


class DMSQwen3DecoderLayer(nn.Module):
    """vLLM's layer names its attention class in its constructor, so this one is built here."""

    def __init__(
        self,
        config: Qwen3Config,
        cache_config: CacheConfig | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        set_default_rope_theta(config, default_theta=1000000)
        self.self_attn = DMSQwen3Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None),
            max_position=config.max_position_embeddings,
            rope_parameters=config.rope_parameters,
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=getattr(config, "attention_bias", False),
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = qwen3.Qwen3MLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return dms_layer_forward(self, positions, hidden_states, residual)


class DMSQwen3Model(qwen3.Qwen3Model):
    decoder_layer_type = DMSQwen3DecoderLayer


class DMSQwen3ForCausalLM(DMSWeights, qwen3.Qwen3ForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the parent would build the stock model
        config = vllm_config.model_config.hf_config
        self.config = config
        self.vllm_config = vllm_config
        self.quant_config = vllm_config.quant_config
        self.set_dms_config(vllm_config)
        self.model = DMSQwen3Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
