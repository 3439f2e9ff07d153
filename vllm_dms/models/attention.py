"""What a self-attention module of vLLM becomes: it reads a decision and passes it on with the keys.

Classes to be put before vLLM's own (`graft`), which keep everything that vLLM's constructor made.
"""

import torch
from torch import nn

from vllm_dms.models.decision import AlphaAdapter, BorrowedChannel


class StreamNorm(nn.Module):
    """`input_layernorm` that also hands on what it normed, to vLLM's unchanged decoder layer.

    The layer gives what is returned first to its `self_attn`, and keeps the second as its residual.
    """

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None):
        if residual is None:
            return super().forward(hidden_states), hidden_states
        normed, residual = super().forward(hidden_states, residual)
        return (normed, residual), residual


class DMSSelfAttention(nn.Module):
    """The forward of vLLM's self-attention, with a decision in it."""

    dms_source: BorrowedChannel | AlphaAdapter
    dms_qk_norm: bool
    dms_fused: bool

    def forward(
        self, positions: torch.Tensor, hidden_states: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """``hidden_states`` after and before `input_layernorm`, each [T, hidden]."""
        normed, stream = hidden_states
        qkv, _ = self.qkv_proj(normed)
        if self.dms_fused:
            alpha = self.dms_source.given(stream)
            output, _ = self.o_proj(self.attn.forward_projection(qkv, positions, alpha))
            return output
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.dms_qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(1)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(1)
        alpha, q = self.dms_source.read(stream, q)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(self.dms_source.rotated(q), k, v, alpha))
        return output
