"""The same seed gives the same bytes: attention's gradients, dense training, the retrofit."""

import hashlib
import string
from random import Random

import pytest
import torch
from retrofit_runs import dense, run  # noqa: F401 - dense is a fixture

from examples.tiny import train_dense
from vllm_dms.retrofit import __main__ as cli
from vllm_dms.retrofit.attention import attention
from vllm_dms.retrofit.determinism import deterministic


def sha256(model):
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("dialect", ["adapter", "borrowed"])
@pytest.mark.parametrize("train", ["decisions", "all"])
def test_a_retrofit_is_decided_by_its_seed(dense, tmp_path, dialect, train):  # noqa: F811
    source = dense("qwen3", attention_bias=False)
    options = ["--dialect", dialect, "--train", train]
    for name, seed in (("first", 5), ("second", 5), ("other", 6)):
        run(source, tmp_path / name, *options, "--seed", str(seed))
    assert sha256(tmp_path / "first") == sha256(tmp_path / "second")
    assert sha256(tmp_path / "first") != sha256(tmp_path / "other")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dialect", "train"), [("adapter", "decisions"), ("borrowed", "decisions"), ("borrowed", "all")]
)
def test_a_long_retrofit_is_decided_by_its_seed(dense, tmp_path, dialect, train):  # noqa: F811
    """3 chunks of queries and 36 blocks of keys: room for sums in varying order."""
    source = dense("qwen3", head_dim=64, hidden_size=256, max_position_embeddings=4096)
    text = tmp_path / "text.txt"
    text.write_text("".join(Random(0).choices(string.ascii_letters, k=12 * 2304)))
    long = ["--data", str(text), "--length", "2304", "--batch", "8", "--micro-batch", "4"]
    for name in ("first", "second"):
        run(source, tmp_path / name, *long, "--dialect", dialect, "--train", train)
    assert sha256(tmp_path / "first") == sha256(tmp_path / "second")


@pytest.mark.gpu
def test_gradients_of_attention_add_up_in_one_order_on_the_gpu():
    """The embedded checkpoint's shape: without determinism 64 blocks of keys race for a query."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(8, 4096, 4, 64), (8, 4096, 2, 64), (8, 4096, 2, 64), (8, 2, 4096)]
    *qkv, log_keep = (
        torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) for s in shapes
    )
    log_keep = -log_keep.float().abs()
    inputs = [x.requires_grad_() for x in (*qkv, log_keep)]
    for mask in (log_keep, None):
        wanted = inputs if mask is not None else inputs[:3]
        with deterministic():
            found = [
                torch.autograd.grad(attention(*qkv, mask, window=64).float().sum(), wanted)
                for _ in range(5)
            ]
        for again in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_dense_training_is_decided_by_its_seed(tmp_path):
    """Whoever writes the text: no worker, or two of them."""
    for name, seed, workers in (("first", 0, 0), ("second", 0, 2), ("other", 1, 0)):
        options = ["--preset", "test", "--seed", str(seed), "--workers", str(workers)]
        train_dense.main(["--out", str(tmp_path / name), *options])
    assert sha256(tmp_path / "first") == sha256(tmp_path / "second")
    assert sha256(tmp_path / "first") != sha256(tmp_path / "other")


def test_determinism_is_the_default(dense, tmp_path, monkeypatch):  # noqa: F811
    modes = []
    monkeypatch.setattr(
        cli.Trainer, "run", lambda *_, **__: modes.append(torch.get_deterministic_debug_mode())
    )
    monkeypatch.setattr(cli, "plot_log", lambda *_: True)
    source = dense("qwen3", attention_bias=False)
    run(source, tmp_path)
    run(source, tmp_path, "--no-deterministic")
    assert modes == [2, 0]


def test_determinism_ends_with_its_block():
    before = torch.get_deterministic_debug_mode()
    with pytest.raises(ValueError), deterministic():
        assert torch.get_deterministic_debug_mode() == 2  # errors, not warnings
        raise ValueError
    assert torch.get_deterministic_debug_mode() == before
    with deterministic(False):
        assert torch.get_deterministic_debug_mode() == before
