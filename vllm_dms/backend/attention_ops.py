"""The two ops of a DMS layer, which a compiled graph leaves alone: of what attention takes, and of
the projection that it is made from."""

from typing import Any

import torch
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_dms.backend.ops import attend
from vllm_dms.backend.state import Batch


def _begin_layer(layer_name: str) -> tuple[Any, Batch] | None:
    """The layer, with its arena bound, and the step; None while vLLM profiles its memory."""
    context = get_forward_context()
    if context.attn_metadata is None:
        return None
    layer = context.no_compile_layers[layer_name]
    batch = context.attn_metadata[layer_name].batch
    layer.dms_runtime.bind(layer.kv_cache)
    if layer.layer_index == 0:
        layer.dms_runtime.ops.begin_step(batch)
    return layer, batch


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    alpha: torch.Tensor,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    found = _begin_layer(layer_name)
    if found is None:
        output.zero_()
        return
    layer, batch = found
    attend(layer.dms_runtime.ops, batch, layer.layer_index, query, key, value, alpha, output)


def _attention_of_projection(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    alpha: torch.Tensor | None,
    rotated: torch.Tensor,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    found = _begin_layer(layer_name)
    if found is None:
        output.zero_()
        return
    layer, batch = found
    layer.dms_runtime.ops.attend_projection(
        batch, layer.layer_index, layer.projection, qkv, positions, alpha, rotated, output
    )


def _nothing(*args: object) -> None:
    """Of fake tensors: all results are arguments."""


_library = Library("vllm_dms", "FRAGMENT")
for _name, _op, _results in (
    ("attention", _attention, ["output"]),
    ("attention_of_projection", _attention_of_projection, ["rotated", "output"]),
):
    direct_register_custom_op(
        op_name=_name,
        op_func=_op,
        mutates_args=_results,
        fake_impl=_nothing,
        target_lib=_library,
    )
