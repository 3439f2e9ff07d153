"""Gates: what a layer's decision logits do to its keys, in training and evaluation.

A gate maps decision logits (B, H, T) of one layer to
  log_keep  (B, H, T) or None: added to attention scores of a key outside the window, in
            decision time (the forward shifts it to the token whose fate it is); None: keep all
  evict     (B, H, T): decisions as 0 or 1, with a gradient where the gate has one
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Gate = Callable[[torch.Tensor, int], tuple[torch.Tensor | None, torch.Tensor]]


def keep_all(logits: torch.Tensor, layer: int) -> tuple[None, torch.Tensor]:
    """Eviction off: the control arm, and the teacher."""
    return None, torch.zeros_like(logits)


def hard(logits: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The decision as it is served."""
    return _log_keep(logits > 0), (logits > 0).to(logits.dtype)


def _log_keep(evict: torch.Tensor) -> torch.Tensor:
    return torch.zeros(evict.shape, device=evict.device).masked_fill(evict, -torch.inf)


class Bounded(torch.autograd.Function):
    """Cut to [-bound, bound]; of what is outside, descent may go on inwards only."""

    @staticmethod
    def forward(ctx, logits, bound):
        ctx.save_for_backward(logits)
        ctx.bound = bound
        return logits.clamp(-bound, bound)

    @staticmethod
    def backward(ctx, upstream):
        (logits,) = ctx.saved_tensors
        outwards = (logits.abs() > ctx.bound) & (upstream * logits < 0)
        return upstream.masked_fill(outwards, 0.0), None


@dataclass(frozen=True)
class GumbelSigmoid:
    """The training gate: soft in attention, hard with a straight-through gradient in the share
    evicted.

    The noise is a pure function of (seed, layer): a recomputed forward draws the same.

    bound: logits are cut to [-bound, bound], so that noise still tries the other decision now and
    then. Without (0) a head that early steps push far to one side gets no gradient ever again.
    """

    tau: float
    seed: int
    bound: float = 0.0

    def __call__(self, logits: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.bound:
            logits = Bounded.apply(logits, self.bound)
        generator = torch.Generator(logits.device).manual_seed(1000 * self.seed + layer)
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
        # The difference of two Gumbel variables is logistic.
        noise = torch.logit(uniform.clamp(1e-6, 1 - 1e-6))
        soft = (logits.float() + noise) / self.tau
        probability = soft.sigmoid()
        evict = (soft > 0).float() - probability.detach() + probability
        # log(1 - p) without the rounding of 1 - p.
        return F.logsigmoid(-soft), evict
