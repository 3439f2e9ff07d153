"""Attention for training: the kernels' values and gradients are the plain version's, the plain
version's are those of one softmax, and long rows hold no mask."""

import pytest
import torch

from vllm_dms.retrofit import attention as module
from vllm_dms.retrofit.attention import GatedAttention, Tile, Tiles, attention, plain

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Small blocks: the interpreter is slow, and every kind of block must occur in few tokens.
TILES = Tiles(Tile(16, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))


def inputs(batch, tokens, heads, kv_heads, dim, device=DEVICE, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, tokens, heads, dim),
        (batch, tokens, kv_heads, dim),
        (batch, tokens, kv_heads, dim),
    ]
    qkv = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    # Soft gates as training has them: most near 0 or far below.
    log_keep = torch.randn(batch, kv_heads, tokens, generator=generator).mul(4)
    log_keep = torch.nn.functional.logsigmoid(log_keep).to(device)
    return [x.requires_grad_() for x in (*qkv, log_keep)]


def softmax_with_a_mask(q, k, v, log_keep, window):
    """In double precision, the mask in one piece."""
    group, tokens = q.shape[2] // k.shape[2], q.shape[1]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v, log_keep = (x.repeat_interleave(group, 1) for x in (k, v, log_keep.double()))
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    distance = distance.to(q.device)
    bias = torch.where(distance > window, log_keep.unsqueeze(2), 0.0)
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    return (scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def results(function, tensors, window, weights):
    out = function(*tensors, window)
    gradients = torch.autograd.grad((out * weights).sum(), tensors)
    return [out, *gradients]


def relative_error(found, truth):
    size = truth.double().norm().clamp_min(1e-30)  # a gate inside every window has no gradient
    return ((found.double() - truth.double()).norm() / size).item()


def check(function, tensors, window, bound):
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(9))
    weights = weights.to(tensors[0].device)
    found = results(function, tensors, window, weights)
    truth = results(softmax_with_a_mask, tensors, window, weights.double())
    for name, mine, true in zip(("out", "dq", "dk", "dv", "dgate"), found, truth, strict=True):
        assert relative_error(mine, true) < bound, name


SHAPES = [
    # batch, tokens, heads, kv_heads, dim, window
    (1, 96, 2, 2, 16, 20),  # whole blocks
    (2, 75, 4, 2, 16, 17),  # cut rows
    (1, 70, 3, 1, 32, 1),  # the smallest window
    (1, 64, 2, 1, 16, 500),  # everything inside the window
    (1, 50, 6, 2, 20, 9),  # a head_dim that is no power of two
    (1, 5, 2, 1, 16, 2),  # less than a block
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_one_softmax(monkeypatch, shape):
    monkeypatch.setattr(module, "choose_tiles", lambda q: TILES)
    *sizes, window = shape
    check(GatedAttention.apply, inputs(*sizes), window, 1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_plain_version_is_one_softmax(monkeypatch, shape):
    monkeypatch.setattr(module, "QUERY_BLOCK", 16)
    *sizes, window = shape
    check(plain, inputs(*sizes), window, 1e-5)


def test_evicted_keys_get_no_weight_and_no_gradient(monkeypatch):
    """Hard decisions: minus infinity, in whole blocks too."""
    monkeypatch.setattr(module, "choose_tiles", lambda q: TILES)
    q, k, v, log_keep = inputs(1, 96, 2, 1, 16)
    evict = torch.zeros_like(log_keep, dtype=torch.bool)
    evict[..., :40] = evict[..., 45:70:3] = True
    log_keep = torch.zeros_like(log_keep).masked_fill(evict, -torch.inf).requires_grad_()
    check(GatedAttention.apply, [q, k, v, log_keep], 20, 1e-5)
    out = GatedAttention.apply(q, k, v, log_keep, 20)
    dk, d_gate = torch.autograd.grad(out[:, -1].sum(), [k, log_keep])
    assert not dk[:, :40].any() and not d_gate[..., :40].any()
    assert dk[:, 41:44].any()


def test_without_gates_it_is_causal():
    q, k, v, log_keep = inputs(2, 40, 4, 2, 16)
    truth = softmax_with_a_mask(q, k, v, torch.zeros_like(log_keep), 5)
    assert relative_error(attention(q, k, v, None, 5), truth) < 1e-5


def test_what_needs_no_gradient_gets_none(monkeypatch):
    monkeypatch.setattr(module, "choose_tiles", lambda q: TILES)
    q, k, v, log_keep = inputs(1, 64, 2, 1, 16)
    whole = torch.autograd.grad(GatedAttention.apply(q, k, v, log_keep, 9).sum(), log_keep)[0]
    out = GatedAttention.apply(q.detach(), k.detach(), v.detach(), log_keep, 9)
    assert torch.equal(torch.autograd.grad(out.sum(), log_keep)[0], whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": (1, 8, 3, 16), "v": (1, 8, 3, 16)}, "a whole number of query heads"),
        ({"v": (1, 8, 2, 8)}, "must be"),
        ({"log_keep": (1, 4, 8)}, "log_keep has shape"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_wrong_shapes_are_refused(changes, message):
    shapes = {"q": (1, 8, 4, 16), "k": (1, 8, 2, 16), "v": (1, 8, 2, 16), "log_keep": (1, 2, 8)}
    window = changes.pop("window", 3)
    tensors = [torch.zeros(s) for s in (shapes | changes).values()]
    with pytest.raises(ValueError, match=message):
        GatedAttention.apply(*tensors, window)
