"""The retrofit's gates, attention, counts, schedules and rows, each by itself."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from vllm_dms.retrofit import attention, data, losses, memory, rotary
from vllm_dms.retrofit.checkpoint import prepare
from vllm_dms.retrofit.forward import forward
from vllm_dms.retrofit.gates import GumbelSigmoid
from vllm_dms.retrofit.losses import live_tokens
from vllm_dms.retrofit.recipe import Recipe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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


class Norm(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        generator = torch.Generator().manual_seed(size)
        self.weight = torch.nn.Parameter(torch.rand(size, generator=generator) + 0.5)
        self.weight.requires_grad_(False)
        self.variance_epsilon = 1e-6


@pytest.mark.parametrize("dim", [16, 20, 64])
@pytest.mark.parametrize("with_norm", [False, True])
def test_norm_and_rotation_in_one_kernel(dim, with_norm):
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(2, 5, 3, dim, generator=generator).to(DEVICE) for _ in range(2))
    cos, sin = (torch.randn(1, 5, dim, generator=generator).to(DEVICE) for _ in range(2))
    norm = Norm(dim).to(DEVICE) if with_norm else None
    x.requires_grad_()
    weight = norm.weight if with_norm else None
    found = rotary.NormAndRotate.apply(x, weight, 1e-6, cos, sin)
    truth = rotary.rotate(rotary.rms_norm(x, norm) if with_norm else x, cos, sin)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, truth)]
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gives_the_gradient_of_the_plain_loss(monkeypatch):
    monkeypatch.setattr(losses, "TOKEN_CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 8, generator=generator) for _ in range(2))
    upstream = torch.rand(10, generator=generator)
    student_head, teacher_head = (torch.nn.Linear(8, 30, bias=False) for _ in range(2))
    found = []
    for trained in (True, False):
        student_head.requires_grad_(trained)
        hidden = student.clone().requires_grad_()
        kl = losses.forward_kl(hidden, teacher, student_head, teacher_head)
        found.append((kl, torch.autograd.grad((kl * upstream).sum(), hidden)[0]))
    for mine, true in zip(*found, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


def tiny_model(dialect, train_all=False):
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SMALL))
    recipe = Recipe(window=8, length=64, dialect=dialect, alpha_scale=20.0, alpha_offset=0.0)
    prepare(model, recipe.dms(), train_all)
    for name, parameter in model.named_parameters():
        if "dms_" in name and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model, recipe.dms()


@pytest.mark.parametrize("dialect", ["adapter", "borrowed"])
@pytest.mark.parametrize("change", ["kernels", "recompute"])
def test_a_model_has_the_same_gradients(monkeypatch, dialect, change):
    """With the kernels instead of the plain version, and when layers are computed again."""
    model, dms = tiny_model(dialect)
    ids = torch.randint(0, 64, (2, 48), generator=torch.Generator().manual_seed(3))
    weights = torch.randn(2, 48, 32, generator=torch.Generator().manual_seed(4))

    def gradients(**kwargs):
        output = forward(model, ids, dms, GumbelSigmoid(0.5, seed=1), **kwargs)
        loss = (output.hidden * weights).mean() + output.evict.mean()
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(loss, trained)

    truth = gradients()
    if change == "kernels":
        monkeypatch.setattr(attention, "plain", attention.GatedAttention.apply)
        found = gradients()
    else:
        found = gradients(recompute=1)
    for mine, true in zip(found, truth, strict=True):
        assert true.abs().max() > 0
        assert (mine - true).norm() <= 1e-4 * true.norm()


def test_as_few_layers_recompute_as_memory_asks_for(monkeypatch):
    """The Qwen3-8B shape on 80 GB: none at 8,192 tokens, all but a few at 32,768."""
    model = SimpleNamespace(
        config=Qwen3Config(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, head_dim=128,
            num_attention_heads=32, num_key_value_heads=8,
        ),
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 84e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 16.4e9)
    counts = [memory.layers_to_recompute(model, n << 10) for n in (4, 8, 16, 32, 128)]
    assert counts == sorted(counts) and counts[:2] == [0, 0] and 20 < counts[3] < 36
    assert counts[4] == 36
    model.device = torch.device("cpu")
    assert memory.layers_to_recompute(model, 1 << 20) == 0


EXPERTS = {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 256}


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (Qwen3Config(**SMALL), Qwen3ForCausalLM),
        (Qwen3MoeConfig(**SMALL, **EXPERTS), Qwen3MoeForCausalLM),
    ],
    ids=["dense", "experts"],
)
def test_an_mlp_keeps_what_is_counted(config, model_class):
    """Bytes for the gradients of frozen weights, all but experts' indices."""
    mlp = model_class(config).bfloat16().requires_grad_(False).model.layers[0].mlp
    tokens, kept = 512, {}
    x = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    known = {t.untyped_storage().data_ptr() for t in (x, *mlp.parameters())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # alive, so that no other has its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = mlp(x)
    assert y.requires_grad
    found = sum(s.nbytes() for address, s in kept.items() if address not in known) / tokens
    rest = Qwen3Config(**SMALL | {"intermediate_size": 0})
    counted = memory.bytes_a_token(config, 2)[0] - memory.bytes_a_token(rest, 2)[0]
    assert counted == pytest.approx(found, rel=0.05 if model_class is Qwen3MoeForCausalLM else 0)


def test_a_bound_leaves_no_logit_without_a_way_back():
    """Far outside only noise reaches the other decision; a gradient never leads further out."""
    logits = torch.cat((torch.full((20_000,), -40.0), torch.full((20_000,), 40.0)))
    logits = logits.view(1, 1, -1).requires_grad_()
    for bound, reached in ((0.0, False), (4.0, True)):
        _, evict = GumbelSigmoid(0.1, seed=0, bound=bound)(logits, layer=0)
        share = evict[..., :20_000].mean().item()
        assert share == pytest.approx(reached / (1 + math.exp(4)), rel=0.2)
        for asked, inwards in ((-evict, slice(0, 20_000)), (evict, slice(20_000, None))):
            (found,) = torch.autograd.grad(asked.sum(), logits, retain_graph=True)
            assert found[..., inwards].any() == reached
            found[..., inwards] = 0
            assert not found.any()
