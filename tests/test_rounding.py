"""The roundings that eval_rounding compares: DMS's own are its storages, variants are no worse."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import eval_rounding

from benchmarks.quality import roundings
from benchmarks.quality.roundings import ARMS, groups, rotated


@pytest.fixture
def vectors():
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    return x * torch.logspace(-2, 2, 500)[:, None]


def error(out, x):
    """Relative to the vector, squared, on average."""
    return ((out - x).square().sum(-1) / x.square().sum(-1)).mean().item()


def test_variants_begin_with_the_storage_itself(vectors):
    key, value = ARMS["int4"]
    as_key = rotated(roundings.centered(rotated(groups(vectors)))).flatten(-2)
    torch.testing.assert_close(as_key, key(vectors), rtol=1e-5, atol=1e-5)
    as_value = roundings.centered(groups(vectors)).flatten(-2)
    torch.testing.assert_close(as_value, value(vectors), rtol=1e-5, atol=1e-5)


def test_variants_err_less_with_a_searched_scale_and_more_without_a_center(vectors):
    for variant, own in zip(ARMS["int4_search"], ARMS["int4"], strict=True):
        assert error(variant(vectors), vectors) < error(own(vectors), vectors)
    plain, own = ARMS["int4_plain"][1], ARMS["int4"][1]
    assert error(plain(vectors), vectors) > error(own(vectors), vectors)


def test_turboquants_keys_keep_their_norm_and_err_as_sixteen_levels_must(vectors):
    out = ARMS["turboquant_4bit_nc"][0](vectors)
    torch.testing.assert_close(out.norm(dim=-1), vectors.norm(dim=-1), rtol=1e-3, atol=0)
    # Lloyd-Max with 16 levels leaves 0.0095 of a normal number's variance.
    assert error(out, vectors) == pytest.approx(0.0095, rel=0.1)


def test_vllms_fp8_cuts_off_what_a_scale_per_vector_does_not():
    x = torch.tensor([[1.0, 500.0]])
    for of_vllm, own in zip(ARMS["vllm_fp8"], ARMS["fp8"], strict=True):
        assert of_vllm(x)[0].tolist() == [1.0, 448.0]
        assert own(x)[0, 1].item() == pytest.approx(500, rel=0.01)


def test_a_models_arms_are_measured_against_itself(tmp_path, monkeypatch):
    command = ["x", "--length", "100", "--documents", "1", "--out", str(tmp_path), "--commit", "c"]
    command += ["--arms", "fp8,int4_value_only,turboquant_4bit_nc_as_vllm,turboquant_4bit_nc"]
    (tmp_path / "quality_rounding.json").write_text(json.dumps([{"model": "other"}]))
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setitem(ARMS, "fp8", (torch.Tensor.float, torch.Tensor.float))
    eval_rounding.main()
    other, *rows = json.loads((tmp_path / "quality_rounding.json").read_text())
    assert other == {"model": "other"}
    nothing, value, as_vllm, all_layers = (row["kl_mean"] for row in rows)
    assert nothing == 0 and value > 0
    assert 0 < as_vllm < all_layers / 5  # four of five layers are as they are
