"""The adapter as an op of its own, so that a compiled graph can choose by the number of tokens."""

import torch
import torch.nn.functional as F
from torch.library import Library
from vllm import _custom_ops as ops
from vllm.utils.torch_utils import direct_register_custom_op


def _alpha(
    hidden_states: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    # Imported here: Triton is absent from CPU installations of vLLM, which don't get here.
    from vllm_dms.backend.kernels.adapter import MAX_TOKENS, launch_alpha

    if hidden_states.shape[0] <= MAX_TOKENS:
        return launch_alpha(hidden_states, norm, weight, bias, eps)
    normed = torch.empty_like(hidden_states)
    ops.rms_norm(normed, hidden_states, norm, eps)
    return F.linear(normed, weight, bias)


def _alpha_fake(
    hidden_states: torch.Tensor,
    norm: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    return hidden_states.new_empty(hidden_states.shape[0], weight.shape[0])


_library = Library("vllm_dms", "FRAGMENT")
direct_register_custom_op(
    op_name="alpha", op_func=_alpha, fake_impl=_alpha_fake, target_lib=_library
)
