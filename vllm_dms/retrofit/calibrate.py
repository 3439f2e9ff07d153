"""After training: the threshold at which rows reach a live ratio."""

from dataclasses import replace

import torch
from torch import nn

from vllm_dms.config import DMSConfig

from .forward import forward
from .gates import hard
from .losses import live_tokens

STEP, TRIES = 0.25, 12  # logits, doubled at every try
PLACES = 2  # to which an offset is rounded: what is below is rounding of the logits


def check_live(live: float, window: int, tokens: int) -> None:
    most = tokens / min(tokens, window + 1)
    if not 1 < live < most:
        raise ValueError(
            f"--live is {live:g}, but rows of {tokens} tokens with a window of {window} have live "
            f"ratios between 1 and {most:.2f}."
        )


@torch.no_grad()
def live_ratio(
    model: nn.Module, dms: DMSConfig, rows: torch.Tensor, autocast: bool = False
) -> float:
    """Dense over live tokens at the end of rows (N, T), decisions as they are served."""
    live, device = 0.0, model.device
    for ids in rows.long().to(device).split(1):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            evict = forward(model, ids, dms, hard).evict
        live += live_tokens(evict, dms.window, dms.shift).float().mean().item()
    return len(rows) * rows.shape[1] / live


def calibrate(
    model: nn.Module, dms: DMSConfig, rows: torch.Tensor, live: float, autocast: bool = False
) -> DMSConfig:
    """-> dms with the highest alpha_offset, to PLACES, at which rows (N, T) reach the ratio `live`.

    The higher the offset, the fewer are evicted; what is evicted changes later decisions a little,
    which is why the ratio is measured anew at each."""
    check_live(live, dms.window, rows.shape[1])

    def at(offset: float) -> DMSConfig:
        return replace(dms, alpha_offset=round(offset, PLACES))

    def reached(offset: float) -> bool:
        return live_ratio(model, at(offset), rows, autocast) >= live

    low = high = dms.alpha_offset  # reached at low, not at high
    up = reached(low)
    for step in (STEP * 2**n for n in range(TRIES)):
        if up:
            low, high = high, high + step
            if not reached(high):
                break
        else:
            low, high = low - step, low
            if reached(low):
                break
    while high - low > 1.5 * 10**-PLACES:
        middle = round((low + high) / 2, PLACES)
        low, high = (middle, high) if reached(middle) else (low, middle)
    return at(low)
