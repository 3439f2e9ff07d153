"""The retrofit's gates, attention, counts, schedules and rows, each by itself."""

import pytest
import torch

from vllm_dms.retrofit import data, forward
from vllm_dms.retrofit.gates import GumbelSigmoid
from vllm_dms.retrofit.losses import live_tokens
from vllm_dms.retrofit.recipe import Recipe

# Largest error of values near 1: on a GPU, fp32 products of tensor cores.
NOISE = {"cpu": 1e-5, "cuda": 1e-3}


def test_gumbel_sigmoid_gates():
    logits = torch.linspace(-8, 8, 4000).repeat(2, 2, 1).requires_grad_()
    log_keep, evict = GumbelSigmoid(0.1, seed=3)(logits, layer=0)
    again = GumbelSigmoid(0.1, seed=3)(logits, layer=0)
    assert torch.equal(log_keep, again[0]) and torch.equal(evict, again[1])
    assert set(evict.detach().round(decimals=4).unique().tolist()) == {0.0, 1.0}
    # Logistic noise: the share evicted at a logit is its sigmoid.
    near_one = evict[..., (logits[0, 0] > 0.5) & (logits[0, 0] < 1.5)].mean()
    assert abs(near_one - torch.sigmoid(torch.tensor(1.0))) < 0.05
    assert ((log_keep < -0.7) == (evict > 0.5)).float().mean() > 0.99
    evict.mean().backward()
    assert logits.grad.abs().sum() > 0 and (logits.grad >= 0).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_attention_is_softmax_with_a_mask(monkeypatch, device):
    """Values and gradients, in chunks of queries, against one plain softmax."""
    monkeypatch.setattr(forward, "QUERY_CHUNK", 16)
    tokens, window, group = 40, 5, 3
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2 * group, tokens, 8), (2, 2, tokens, 8), (2, 2, tokens, 8), (2, 2, tokens)]
    q, k, v, keep = (torch.randn(s, generator=generator).to(device) for s in shapes)
    inputs = [x.requires_grad_() for x in (q, k, v, -keep.abs())]
    weights = torch.randn(q.shape, generator=generator).to(device)

    def plain(q, k, v, log_keep):
        k, v, log_keep = (x.repeat_interleave(group, 1) for x in (k, v, log_keep))
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
        far, future = (distance > window).to(device), (distance < 0).to(device)
        scores = q @ k.mT * 8**-0.5 + far * log_keep.unsqueeze(2)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ v

    found, truth = forward.attention(*inputs, window), plain(*inputs)
    gradients = [torch.autograd.grad((x * weights).sum(), inputs) for x in (found, truth)]
    for mine, true in [(found, truth), *zip(*gradients, strict=True)]:
        torch.testing.assert_close(mine, true, rtol=NOISE[device], atol=NOISE[device])


def test_live_tokens_counts_survivors():
    evict = torch.zeros(10)
    evict[[1, 3, 9]] = 1
    # W = 2, shift 1: keys 0..6 are outside; deciders 1..7 evict keys 0 and 2; decider 9 speaks of
    # key 8, inside.
    assert live_tokens(evict, window=2, shift=1).item() == 8


def test_schedules():
    recipe = Recipe(ratio=8, ramp=0.5, lr=1.0)
    assert [recipe.target_ratio(p) for p in (0, 0.25, 0.5, 1)] == [1, 4.5, 8, 8]
    assert recipe.target_share(0) == 0 and recipe.target_share(1) == 1 - 1 / 8
    assert recipe.learning_rate(0.5) == 1.0 and abs(recipe.learning_rate(1.0) - 0.1) < 1e-9


def test_rows_and_batches():
    rows = data.pack([[1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11]], length=4, eos=0)
    assert rows.tolist() == [[1, 2, 3, 4], [5, 6, 0, 7], [8, 9, 10, 11]]
    epoch = torch.cat([data.batch(rows, step, 1, seed=4) for step in range(3)])
    assert sorted(epoch.tolist()) == sorted(rows.tolist())
