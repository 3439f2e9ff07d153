"""Where a layer's decision is read, for both checkpoint forms; used by every model family.

``alpha`` [T, H] is the value whose scaled and shifted sign decides; the threshold itself is applied
where the token is stored (`reference.decide` says in which arithmetic).
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

import vllm_dms.models.adapter_op  # noqa: F401 registers torch.ops.vllm_dms.alpha
from vllm_dms.config import DMSConfig
from vllm_dms.gates import settings_in

logger = init_logger(__name__)


def dms_config(vllm_config: VllmConfig) -> DMSConfig | None:
    """The resolved DMS settings of this engine, or None when it serves the checkpoint densely."""
    resolved = settings_in(vllm_config.additional_config)
    if not isinstance(resolved, dict) or "dialect" not in resolved:
        return None
    return DMSConfig.from_dict(resolved)


class BorrowedChannel(nn.Module):
    """The last channel of the first query head of each group carries the decision.

    NVIDIA's models have it 0 in attention, so it is zeroed both before and after RoPE: before, or
    RoPE would mix it into its partner channel; after, or the partner would leak into it. FastDMS
    zeroes it before RoPE only, or never.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, config: DMSConfig) -> None:
        """Of this rank, which has whole groups: `gates` sees to it."""
        super().__init__()
        self.num_heads, self.group = num_heads, num_heads // num_kv_heads
        self.per_layer = config.alpha_per == "layer"
        self.zero_before, self.zero_after = config.zero != "never", config.zero == "both"
        borrowed = torch.zeros(num_heads, head_dim, dtype=torch.bool)
        borrowed[:: self.group, -1] = True
        self.register_buffer("borrowed", borrowed.flatten(), persistent=False)

    def given(self, stream: torch.Tensor) -> torch.Tensor | None:
        """alpha, if it is not in the query."""
        return None

    def read(self, stream: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha [T, H], query to rotate) of the query [T, H * G * D] after its norm."""
        alpha = query.unflatten(-1, (self.num_heads, -1))[:, :: self.group, -1]
        if self.per_layer:
            alpha = alpha[:, :1].expand_as(alpha)
        return alpha.contiguous(), self.clear(query) if self.zero_before else query

    def rotated(self, query: torch.Tensor) -> torch.Tensor:
        """The query for attention, of the query after RoPE."""
        return self.clear(query) if self.zero_after else query

    def clear(self, query: torch.Tensor) -> torch.Tensor:
        return query.masked_fill(self.borrowed, 0.0)


def check_rounding(qkv_proj: Any) -> None:
    """A borrowed channel is a row of q_proj: rounded with the other weights, it decides otherwise.

    Measured with random weights: of 100 decisions 1 in int8 and 2 in FP8 differ from those of
    unquantized weights, and 5 to 14 in int4.
    """
    method = qkv_proj.quant_method
    if isinstance(method, UnquantizedLinearMethod):
        return
    largest = max(p.numel() * p.element_size() for p in qkv_proj.parameters())
    bits = largest * 8 / (qkv_proj.input_size * qkv_proj.output_size_per_partition)
    # Of a method that rounds when the weights are loaded, they have their full size until then.
    name = type(method).__name__
    remedy = (
        "Use a checkpoint in NVIDIA's adapter form, or leave q_proj, k_proj and v_proj out of the "
        "quantization."
    )
    if bits < 8 or any(kind in name.lower() for kind in ("fp4", "torchao", "humming")):
        raise ValueError(
            f"q_proj has, or may come to have, weights of less than 8 bits ({name}), but the "
            "decision is borrowed from one of its channels, and rounding changes it for many "
            f"tokens. {remedy}"
        )
    logger.warning_once(
        "q_proj is quantized (%s), and the decision is borrowed from one of its channels: 1 or 2 "
        "in 100 decisions can differ from those of unquantized weights. %s",
        name,
        remedy,
    )


class AlphaAdapter:
    """Reads the decision from the hidden state before `input_layernorm`.

    Not a module: the checkpoint keeps the adapter's weights on the attention layer itself, as
    ``dms_proj_alpha`` and ``dms_proj_alpha_norm``; most have no bias, and then it is zero. Every
    rank computes all heads (a few rows) and keeps its own.
    """

    def __init__(
        self,
        total_kv_heads: int,
        num_kv_heads: int,
        hidden_size: int,
        eps: float,
        per_layer: bool,
    ) -> None:
        # None of vLLM's linear layers: those are quantized with the base, and take LoRA.
        self.proj = nn.Linear(hidden_size, total_kv_heads).requires_grad_(False)
        self.norm = RMSNorm(hidden_size, eps=eps)
        self.num_kv_heads = num_kv_heads
        self.per_layer = per_layer
        # With fewer KV heads than ranks, vLLM gives neighbouring ranks the same head.
        rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.first_head = rank * total_kv_heads // world
        # One launch instead of several for the few tokens of a decode step.
        self.fused = self.proj.weight.device.type == "cuda"

    def given(self, stream: torch.Tensor) -> torch.Tensor:
        """alpha [T, H] of the residual stream [T, hidden]."""
        if self.fused:
            alpha = torch.ops.vllm_dms.alpha(
                stream,
                self.norm.weight,
                self.proj.weight,
                self.proj.bias,
                self.norm.variance_epsilon,
            )
        else:
            alpha = self.proj(self.norm(stream))
        if self.per_layer:
            alpha = alpha[:, :1].expand(-1, self.num_kv_heads)
        else:
            alpha = alpha[:, self.first_head : self.first_head + self.num_kv_heads]
        return alpha.contiguous()

    def read(self, stream: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha [T, H], query) of the residual stream [T, hidden] and of the query."""
        return self.given(stream), query

    def rotated(self, query: torch.Tensor) -> torch.Tensor:
        return query  # nothing of it was borrowed
