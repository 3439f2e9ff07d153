"""The checkpoint's tensors as they are loaded: no adapter is left incomplete, no bias dropped."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_dms.adapters import read_adapter
from vllm_dms.config import DMSConfig

DMS_WEIGHT_PREFIX = "self_attn.dms_"
# Where vLLM stacks several of the checkpoint's projections in one.
STACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class DMSWeights(nn.Module):
    """Mixin of the model classes, around vLLM's own loading."""

    dms_config: DMSConfig | None
    # Until the checkpoint was loaded. Later calls may bring a few weights: vLLM updates in chunks.
    dms_weights_due: bool

    def expect_dms_weights(self, vllm_config: VllmConfig, config: DMSConfig | None) -> None:
        self.dms_config = config
        self.dms_weights_due = vllm_config.load_config.load_format != "dummy"

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        if self.dms_config is None:
            return super().load_weights(without_adapter(weights))
        weights = check_adapter_is_wanted(weights, self.dms_config)
        if self.dms_weights_due and self.dms_config.adapter_dir is not None:
            weights = chain(weights, read_adapter(self.dms_config.adapter_dir).tensors.items())
        loaded = super().load_weights(check_biases(weights, dict(self.named_modules())))
        if self.dms_weights_due and self.dms_config.adapter:
            loaded |= complete_adapter(self, loaded)
        self.dms_weights_due = False
        return loaded


def without_adapter(
    weights: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, weight) for name, weight in weights if DMS_WEIGHT_PREFIX not in name)


def check_adapter_is_wanted(
    weights: Iterable[tuple[str, torch.Tensor]], config: DMSConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, weight in weights:
        if DMS_WEIGHT_PREFIX in name and not config.adapter:
            raise ValueError(
                f"the checkpoint has the adapter weight {name}, but its config says that the "
                "decision is borrowed from a query channel (dms_separate_alpha is false). Set "
                '"dms_separate_alpha": true in config.json or remove the weight.'
            )
        yield name, weight


def check_biases(
    weights: Iterable[tuple[str, torch.Tensor]], modules: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """vLLM drops a bias for which the model has no parameter (GPTQ writes some, all zero)."""
    for name, weight in weights:
        owner, _, kind = name.rpartition(".")
        if kind == "bias" and weight.any():
            parent, _, leaf = owner.rpartition(".")
            module = modules.get(f"{parent}.{STACKED.get(leaf, leaf)}") or modules.get(owner)
            if getattr(module, "bias", None) is None:
                raise ValueError(
                    f"the checkpoint has {name}, which is not zero, but vLLM's model has no such "
                    "bias and would drop it. Serve another checkpoint: this one can't be right in "
                    "vLLM, with DMS or without."
                )
        yield name, weight


def complete_adapter(model: nn.Module, loaded: set[str]) -> set[str]:
    """Refuse a checkpoint that lacks adapter weights: an adapter left random evicts at random. Its
    biases are optional, except where NVIDIA's classes have them: -> those set to zero."""
    adapter = {n: p for n, p in model.named_parameters() if DMS_WEIGHT_PREFIX in n}
    absent = sorted(set(adapter) - loaded)
    biases = {name for name in absent if name.endswith(".bias")}
    if getattr(model.config, "attention_bias", False):
        biases = set()
    missing = [name for name in absent if name not in biases]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of {len(adapter)} DMS adapter weights, first "
            f"{missing[0]}; its config says dms_separate_alpha: true. Use a complete checkpoint "
            "(NVIDIA Model-Optimizer format), or set dms_separate_alpha to false if the decision "
            "is in a query channel."
        )
    for name in biases:
        adapter[name].data.zero_()
    return biases
