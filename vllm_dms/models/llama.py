"""Llama with DMS: vLLM's model, with a decision read in each attention layer."""

from typing import Any

import torch
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.model_executor.models import llama

from vllm_dms.models.attention import DMSWeights, dms_forward, dms_layer_forward, install_dms


class DMSLlamaAttention(llama.LlamaAttention):
    def __init__(self, config: LlamaConfig, *, prefix: str, bias: bool, **kwargs: Any) -> None:
        super().__init__(config, prefix=prefix, bias=bias, **kwargs)
        install_dms(self, prefix, bias=bias, eps=config.rms_norm_eps)

    def forward(  # type: ignore[override]
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        output, _ = self.o_proj(dms_forward(self, positions, q, k, v, residual))
        return output


class DMSLlamaDecoderLayer(llama.LlamaDecoderLayer):
    def __init__(
        self, vllm_config: VllmConfig, prefix: str = "", config: LlamaConfig | None = None
    ) -> None:
        super().__init__(vllm_config, prefix, config, attn_layer_type=DMSLlamaAttention)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return dms_layer_forward(self, positions, hidden_states, residual)


class DMSLlamaForCausalLM(DMSWeights, llama.LlamaForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        self.set_dms_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=DMSLlamaDecoderLayer)
