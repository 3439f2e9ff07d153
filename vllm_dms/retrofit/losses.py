"""Distance to the teacher and what a row's decisions amount to."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Tokens whose logits exist at a time: a 150k vocabulary in fp32 is 0.6 MB a token.
TOKEN_CHUNK = 2048


def _kl_chunk(
    student: torch.Tensor, teacher: torch.Tensor, student_head: nn.Module, teacher_head: nn.Module
) -> torch.Tensor:
    """Hidden states (N, hidden) of both -> KL(teacher || student) of each token (N)."""
    target = teacher_head(teacher).float().log_softmax(-1)
    guess = student_head(student).float().log_softmax(-1)
    return F.kl_div(guess, target, reduction="none", log_target=True).sum(-1)


def forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, student_head: nn.Module, teacher_head: nn.Module
) -> torch.Tensor:
    """Hidden states (B, T, hidden) -> forward KL of each token (B * T); logits are never held as a
    whole."""
    parts = zip(
        student.flatten(0, 1).split(TOKEN_CHUNK),
        teacher.flatten(0, 1).split(TOKEN_CHUNK),
        strict=True,
    )
    return torch.cat(
        [
            checkpoint(_kl_chunk, s, t, student_head, teacher_head, use_reentrant=False)
            for s, t in parts
        ]
    )


def live_tokens(evict: torch.Tensor, window: int, shift: int) -> torch.Tensor:
    """evict (..., T) by deciding token -> live tokens (...) that a compact cache holds after T."""
    tokens = evict.shape[-1]
    # Key j has left the window when T - 1 - j > W; its verdict stands at j + shift.
    outside = max(tokens - window - 1, 0)
    return min(tokens, window + 1) + outside - evict[..., shift : shift + outside].sum(-1)


def live_compression(evict: torch.Tensor, window: int, shift: int) -> float:
    """Dense tokens over live tokens, over all layers, heads and rows."""
    return evict.shape[-1] / live_tokens(evict, window, shift).float().mean().item()
