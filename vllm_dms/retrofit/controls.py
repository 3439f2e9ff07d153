"""What a DMS checkpoint is compared with at the same memory, as gates: evicting blindly, and
keeping a window only."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RandomEviction:
    """The same share per layer and head as `rates` (L, H), tokens drawn blindly."""

    rates: torch.Tensor
    seed: int

    def __call__(self, logits: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(logits.device).manual_seed(1000 * self.seed + layer)
        uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
        return _gated(uniform < self.rates[layer].to(logits.device)[None, :, None], logits)


def window_only(logits: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token is evicted once it leaves the window."""
    return _gated(torch.ones_like(logits, dtype=torch.bool), logits)


def _gated(evict: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_keep = torch.zeros(evict.shape, device=evict.device).masked_fill(evict, -torch.inf)
    return log_keep, evict.to(logits.dtype)
