"""The adapter: in one launch it equals its two steps; of several ranks each reads its own heads."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state

from vllm_dms.backend.kernels.adapter import launch_alpha
from vllm_dms.models import decision

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


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("ranks", "heads"), [(1, 4), (2, 4), (4, 4), (4, 2), (8, 2), (4, 1)])
def test_a_rank_reads_the_decisions_of_its_own_heads(monkeypatch, ranks, heads, per_layer):
    """vLLM deals the KV heads out in order; of more ranks than heads, neighbours share one."""
    own = max(heads // ranks, 1)
    expected = [[r * heads // ranks + i for i in range(own)] for r in range(ranks)]
    if per_layer:
        expected = [[0] * own] * ranks
    found = []
    with set_current_vllm_config(VllmConfig()), torch.device(DEVICE):
        for rank in range(ranks):
            group = SimpleNamespace(rank_in_group=rank, world_size=ranks)
            monkeypatch.setattr(parallel_state, "_TP", group)
            adapter = decision.AlphaAdapter(heads, own, 16, 1e-6, per_layer)
            adapter.fused = False
            adapter.proj.weight.data.zero_()
            adapter.proj.bias.data.copy_(torch.arange(heads))  # alpha is the number of its head
            alpha, query = adapter.read(torch.randn(3, 16), torch.ones(3, 8))
            assert query.all() and alpha.is_contiguous() and (alpha == alpha[0]).all()
            found.append(alpha[0].int().tolist())
    assert found == expected
