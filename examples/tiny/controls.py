"""What a DMS checkpoint is compared with: evicting blindly, and keeping a window only. Both are
gates, as in `vllm_dms.retrofit.gates`. And the checkpoint itself, as the retrofit's forward has it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_dms.config import SUPPORTED_ARCHITECTURES, DMSConfig
from vllm_dms.retrofit.checkpoint import prepare


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


def load_dms(path: Path, dtype: torch.dtype) -> tuple[nn.Module, DMSConfig]:
    """A checkpoint that the retrofit wrote, with its adapter where the forward looks for it."""
    raw = json.loads((path / "config.json").read_text())
    dms = DMSConfig.from_checkpoint(raw)
    if dms is None:
        raise ValueError(f"{path} has no dms_* keys in config.json: it is not a DMS checkpoint.")
    base = next(a for a in SUPPORTED_ARCHITECTURES if raw["architectures"][0].startswith(a))
    config = AutoConfig.from_pretrained(path, architectures=[base])
    model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype)
    if dms.adapter:
        prepare(model, dms, train_all=False)
        missing, _ = model.load_state_dict(_dms_weights(path), strict=False)
        absent = [name for name in missing if "dms_" in name]
        if absent:
            raise ValueError(
                f"{path} lacks weights that its config.json promises: {', '.join(absent)}."
            )
        model.to(dtype)
    return model, dms


def _dms_weights(path: Path) -> dict[str, torch.Tensor]:
    found = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            names = [name for name in tensors.keys() if "dms_" in name]  # noqa: SIM118 - no dict
            found |= {name: tensors.get_tensor(name) for name in names}
    return found
