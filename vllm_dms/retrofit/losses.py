"""Distance to the teacher and what a row's decisions amount to."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# Tokens whose logits exist at a time: a 150k vocabulary in fp32 is 0.6 MB a token.
TOKEN_CHUNK = 1024


def _kl_chunk(
    student: torch.Tensor, teacher: torch.Tensor, student_head: nn.Module, teacher_head: nn.Module
) -> torch.Tensor:
    """Hidden states (N, hidden) of both -> KL(teacher || student) of each token (N)."""
    target = teacher_head(teacher).float().log_softmax(-1)
    guess = student_head(student).float().log_softmax(-1)
    return F.kl_div(guess, target, reduction="none", log_target=True).sum(-1)


class _FrozenHeadKL(torch.autograd.Function):
    """A token's KL depends on its own hidden state alone, so each token's gradient is known as
    soon as its logits are, which then need not be computed again."""

    @staticmethod
    def forward(ctx, student, teacher, student_head, teacher_head):
        kls, gradients = [], []
        for s, t in zip(student.split(TOKEN_CHUNK), teacher.split(TOKEN_CHUNK), strict=True):
            target = F.log_softmax(teacher_head(t), -1, dtype=torch.float32)
            guess = F.log_softmax(student_head(s), -1, dtype=torch.float32)
            truth = target.exp()
            kls.append(target.sub_(guess).mul_(truth).sum(-1))
            slope = guess.exp_().sub_(truth).to(student_head.weight.dtype)
            gradients.append((slope @ student_head.weight).to(student.dtype))
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(kls)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(-1).to(gradient.dtype), None, None, None


def forward_kl(
    student: torch.Tensor, teacher: torch.Tensor, student_head: nn.Module, teacher_head: nn.Module
) -> torch.Tensor:
    """Hidden states (B, T, hidden) -> forward KL of each token (B * T); logits are never held as a
    whole."""
    student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    heads = student_head, teacher_head
    if not student_head.weight.requires_grad:
        return _FrozenHeadKL.apply(student, teacher, *heads)
    parts = zip(student.split(TOKEN_CHUNK), teacher.split(TOKEN_CHUNK), strict=True)
    return torch.cat([checkpoint(_kl_chunk, s, t, *heads, use_reentrant=False) for s, t in parts])


def live_tokens(evict: torch.Tensor, window: int, shift: int) -> torch.Tensor:
    """evict (..., T) by deciding token -> live tokens (...) that a compact cache holds after T."""
    tokens = evict.shape[-1]
    # Key j has left the window when T - 1 - j > W; its verdict stands at j + shift.
    outside = max(tokens - window - 1, 0)
    return min(tokens, window + 1) + outside - evict[..., shift : shift + outside].sum(-1)


def live_compression(evict: torch.Tensor, window: int, shift: int) -> float:
    """Dense tokens over live tokens, over all layers, heads and rows."""
    return evict.shape[-1] / live_tokens(evict, window, shift).float().mean().item()
