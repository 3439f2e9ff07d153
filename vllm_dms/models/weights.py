"""The checkpoint's tensors as they are loaded: those of the adapter must be complete and wanted."""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig

from vllm_dms.config import DMSConfig

DMS_WEIGHT_PREFIX = "self_attn.dms_"


class DMSWeights:
    """Mixin of the model classes, around vLLM's own loading."""

    dms_config: DMSConfig | None
    # Until the checkpoint was loaded. Later calls may bring a few weights: vLLM updates in chunks.
    dms_weights_due: bool

    def expect_dms_weights(self, vllm_config: VllmConfig, config: DMSConfig | None) -> None:
        self.dms_config = config
        self.dms_weights_due = vllm_config.load_config.load_format != "dummy"

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = super().load_weights(check_dms_weights(weights, self.dms_config))  # type: ignore[misc]
        if self.dms_weights_due:
            require_dms_weights(cast(nn.Module, self), loaded, self.dms_config)
            self.dms_weights_due = False
        return loaded


def check_dms_weights(
    weights: Iterable[tuple[str, torch.Tensor]], config: DMSConfig | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass weights on; drop the adapter's when serving densely; refuse what the config denies."""
    for name, weight in weights:
        if DMS_WEIGHT_PREFIX in name:
            if config is None:
                continue
            if not config.adapter:
                raise ValueError(
                    f"the checkpoint has the adapter weight {name}, but its config says that the "
                    "decision is borrowed from a query channel (dms_separate_alpha is false). Set "
                    '"dms_separate_alpha": true in config.json or remove the weight.'
                )
        yield name, weight


def require_dms_weights(model: nn.Module, loaded: set[str], config: DMSConfig | None) -> None:
    """Refuse a checkpoint that lacks adapter weights: an adapter left random evicts at random."""
    if config is None or not config.adapter:
        return
    names = [n for n, _ in model.named_parameters() if DMS_WEIGHT_PREFIX in n]
    missing = sorted(set(names) - loaded)
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} of {len(names)} DMS adapter weights, first "
            f"{missing[0]}; its config says dms_separate_alpha: true. Use a complete checkpoint "
            "(NVIDIA Model-Optimizer format), or set dms_separate_alpha to false if the decision "
            "is in a query channel."
        )
