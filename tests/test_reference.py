"""The reference against brute force and deliberate mistakes."""

import dataclasses
import itertools

import pytest
import torch
from checkpoints import adapter_weights, random_tokens
from safetensors import safe_open

from vllm_dms import reference
from vllm_dms.reference import (
    ReferenceModel,
    attention,
    decide,
    evicted,
    live_counts,
    visible,
    zero_borrowed,
)

NVIDIA_LLAMA = {"arch": "LlamaForCausalLM"}
RECIPES = {
    "borrowed": {},
    "adapter": {"dialect": "nvidia-adapter"},
    "fastdms": {"dialect": "fastdms"},
    "layer": {"alpha_per": "layer"},
    "adapter-layer": {"dialect": "nvidia-adapter", "alpha_per": "layer"},
    "borrowed-llama": {"dialect": "nvidia-borrowed", **NVIDIA_LLAMA},
    "adapter-llama": {"dialect": "nvidia-adapter", **NVIDIA_LLAMA},
    "margin": {"min_margin": 5.0},
    "heavy-tailed": {"heavy_tailed": True, "num_heads": 8, "num_kv_heads": 4},
}
PROMPT = random_tokens(400, seed=7)
FP32_NOISE = 1e-4  # nats; measured 1e-5 to 3e-5 between fp32 and fp64


def log_probs(model, ids=PROMPT):
    return model.logits(ids).log_softmax(-1)


def with_rule(model, **changes):
    """The same weights under another rule."""
    return ReferenceModel(model.config, model.weights, dataclasses.replace(model.dms, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_decision_is_rounded_to_its_dtype_before_the_threshold(dtype):
    step = torch.finfo(dtype).eps
    at_threshold = torch.tensor(0.05, dtype=dtype)
    alpha = torch.stack(
        [at_threshold, at_threshold * (1 - 4 * step), at_threshold * (1 + 4 * step)]
    )
    product = (alpha.double() * 100).to(dtype)
    assert decide(alpha, 100.0, 5.0).tolist() == (product > 5).tolist()
    assert not decide(torch.tensor([0.0, -1.0], dtype=dtype), 100.0, 5.0).any()
    assert decide(torch.tensor([-1.0], dtype=dtype), -100.0, 5.0).all()


def test_bf16_products_round_onto_the_threshold():
    # 0.0500488 is the bf16 next to 0.05; 100 times it is 5.00488, which bf16 rounds to 5.0.
    alpha = torch.tensor([0.05], dtype=torch.bfloat16)
    assert alpha.float() * 100 > 5
    assert not decide(alpha, 100.0, 5.0)


def test_a_token_is_judged_by_the_one_shift_later_and_the_newest_is_kept():
    d = torch.tensor([[True, False, True, True], [False, True, True, False]])
    assert evicted(d, 0).tolist() == d.tolist()
    assert evicted(d, 1).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert evicted(d[:, :1], 1).tolist() == [[False], [False]]


@pytest.mark.parametrize("window", [1, 3, 16, 100])
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 17, 18, 40])
def test_masks_and_live_counts_match_a_cache_that_forgets_token_by_token(num_tokens, window):
    generator = torch.Generator().manual_seed(num_tokens * 1000 + window)
    e = torch.rand(3, num_tokens, generator=generator) < 0.7
    mask = visible(e, window)
    for head in range(3):
        cache: list[int] = []
        for i in range(num_tokens):
            cache.append(i)
            leaving = i - (window + 1)
            if leaving >= 0 and e[head, leaving]:
                cache.remove(leaving)
            assert mask[head, i].nonzero().flatten().tolist() == cache
            assert live_counts(e[head, : i + 1], window) == len(cache)
    some = torch.tensor([num_tokens - 1, 0])
    assert torch.equal(visible(e, window, some), mask[:, some])


def test_attention_shares_each_kv_head_and_its_mask_among_a_group():
    q, k, v = torch.randn(4, 5, 8), torch.randn(2, 9, 8), torch.randn(2, 9, 8)
    mask = torch.rand(2, 5, 9) < 0.5
    mask[..., 0] = True
    out = attention(q, k, v, mask, 0.3)
    for head in range(4):
        for i in range(5):
            keys = mask[head // 2, i].nonzero().flatten()
            weights = (k[head // 2, keys] @ q[head, i] * 0.3).softmax(0)
            torch.testing.assert_close(out[head, i], weights @ v[head // 2, keys])


def test_only_the_borrowed_channels_are_zeroed():
    q = torch.ones(6, 4, 8)
    zeroed = zero_borrowed(q, group=3)
    assert q.all()
    assert (zeroed == 0).nonzero().tolist() == [[h, t, 7] for h in (0, 3) for t in range(4)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_eviction_is_causal_so_one_forward_serves_every_prefix(checkpoint, recipe):
    model = ReferenceModel.from_dir(checkpoint(**RECIPES[recipe]))
    whole = model.forward(PROMPT)
    for length in (1, 17, 18, 200):
        part = model.forward(PROMPT[:length])
        torch.testing.assert_close(part.logits, whole.logits[:length], rtol=0, atol=1e-4)
        settled = length - model.dms.shift  # the newest token may have no verdict yet
        assert torch.equal(part.evict[..., :settled], whole.evict[..., :settled])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_checkpoints_evict_as_asked_and_eviction_shows(checkpoint, recipe):
    model = ReferenceModel.from_dir(checkpoint(**RECIPES[recipe]))
    out = model.forward(PROMPT)
    assert out.evict.shape == (2, model.num_kv_heads, len(PROMPT))
    assert out.evict.float().mean() == pytest.approx(0.875, abs=0.06)
    if model.dms.alpha_per == "layer":
        assert torch.equal(out.evict[:, 0], out.evict[:, 1])
    else:
        assert not torch.equal(out.evict[:, 0], out.evict[:, 1])
    difference = (log_probs(model) - log_probs(with_rule(model, evict=False)))[100:].abs()
    assert difference.median() > 0.5 and difference.max() > 5
    assert out.logits[100:].argmax(-1).unique().numel() > 50


def test_heads_of_a_heavy_tailed_checkpoint_keep_very_different_shares(checkpoint):
    model = ReferenceModel.from_dir(checkpoint(**RECIPES["heavy-tailed"]))
    live = live_counts(model.forward(PROMPT).evict, model.dms.window).flatten()
    assert live.max() > 3 * live.min()


def test_decisions_stay_clear_of_the_threshold_when_a_margin_is_asked_for(checkpoint):
    path = checkpoint(**RECIPES["margin"])
    exact = ReferenceModel.from_dir(path).forward(PROMPT)
    rounded = ReferenceModel.from_dir(path, dtype=torch.bfloat16).forward(PROMPT)
    assert exact.decision_logits.abs().min() > 5
    assert torch.equal(exact.evict, rounded.evict)


def test_disabled_eviction_keeps_everything_but_still_gives_up_the_channel(checkpoint):
    path = checkpoint(disable_eviction=True)
    kept = ReferenceModel.from_dir(path)
    assert not kept.forward(PROMPT).evict.any()
    dense = ReferenceModel(kept.config, kept.weights, None)
    assert (log_probs(kept) - log_probs(dense)).abs().max() > 100 * FP32_NOISE
    evicting = ReferenceModel.from_dir(path, overrides={"evict": True})
    assert evicting.forward(PROMPT).evict.any()


@pytest.mark.parametrize("recipe", ["borrowed", "adapter", "fastdms", "layer"])
@pytest.mark.parametrize("mistake", ["shift", "window + 1", "window - 1"])
def test_an_error_of_one_token_shows(checkpoint, recipe, mistake):
    model = ReferenceModel.from_dir(checkpoint(**RECIPES[recipe]))
    shift, window = model.dms.shift, model.dms.window
    wrong = {
        "shift": {"shift": 1 - shift},
        "window + 1": {"window": window + 1},
        "window - 1": {"window": window - 1},
    }[mistake]
    difference = (log_probs(model) - log_probs(with_rule(model, **wrong))).abs()
    assert difference.max() > 10_000 * FP32_NOISE
    assert difference[100:].median() > 1_000 * FP32_NOISE


@pytest.mark.parametrize("recipe", ["borrowed", "fastdms", "layer", "borrowed-llama"])
def test_where_a_borrowed_channel_is_zeroed_shows(checkpoint, recipe):
    model = ReferenceModel.from_dir(checkpoint(**RECIPES[recipe]))
    assert model.dms.zero == ("before" if recipe == "fastdms" else "both")
    arms = [log_probs(with_rule(model, zero=zero)) for zero in ("never", "before", "both")]
    for a, b in itertools.combinations(arms, 2):
        assert (a - b).abs().max() > 1_000 * FP32_NOISE
        assert (a - b).abs()[100:].median() > 100 * FP32_NOISE


def test_zeroing_before_and_after_rope_is_what_the_words_say(checkpoint, monkeypatch):
    """By hand: the channels that attention sees, for a rotation that swaps the halves of a head."""
    model = ReferenceModel.from_dir(checkpoint())
    seen = {}

    def attend(q, k, v, mask, scale):
        seen["q"] = q
        return attention(q, k, v, mask, scale)

    monkeypatch.setattr(reference, "attention", attend)
    monkeypatch.setattr(reference, "rotate", lambda x, cos, sin: x.roll(x.shape[-1] // 2, -1))
    half = model.head_dim // 2
    for zero, last, partner in (("never", 1, 1), ("before", 1, 0), ("both", 0, 0)):
        with_rule(model, zero=zero).forward(PROMPT[:20])
        borrowed, others = seen["q"][:: model.group], seen["q"][1 :: model.group]
        assert borrowed[..., -1].any() == last and borrowed[..., half - 1].any() == partner
        assert others[..., -1].all() and others[..., half - 1].all()


@pytest.mark.parametrize("recipe", ["borrowed", "adapter", "fastdms"])
def test_checkpoints_hold_exactly_the_dms_weights_of_their_format(checkpoint, recipe):
    path = checkpoint(**RECIPES[recipe])
    dms = ReferenceModel.from_dir(path).dms
    with safe_open(path / "model.safetensors", "pt") as file:
        found = {name for name in file.keys() if "dms" in name}  # noqa: SIM118
    assert found == (adapter_weights(2) if dms.adapter else set())
