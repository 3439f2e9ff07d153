"""The adapter in one launch equals its two steps, in each dtype's own rounding."""

import pytest
import torch
import torch.nn.functional as F

from vllm_dms.backend.kernels.adapter import launch_alpha

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter has no bfloat16 arithmetic.
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if ON_GPU else [torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "size", "heads"), [(1, 96, 2), (5, 1500, 8), (3, 4096, 5)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_alpha_equals_norm_and_projection(dtype, tokens, size, heads, with_bias):
    g = torch.Generator().manual_seed(size)

    def randn(*shape):
        return torch.randn(shape, generator=g).to(DEVICE, dtype)

    x, norm, weight = 3 * randn(tokens, size), 1 + 0.1 * randn(size), randn(heads, size)
    bias = randn(heads) if with_bias else None
    got = launch_alpha(x, norm, weight, bias, 1e-6)

    scale = (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    normed = (x.float() * scale).to(dtype) * norm
    expected = F.linear(normed.double(), weight.double(), bias.double() if with_bias else None)
    # Rounding the normed values moves a sum of `size` terms by about the root of their number.
    rounding = torch.finfo(dtype).eps * (expected.abs() + 2 * size**0.5)
    error = (got.double() - expected).abs()
    assert (error <= rounding + 1e-4).all(), error.max()
