"""Adapter directories: written and read back whole, whatever the prefix; one clear error for each
way in which adapter and base don't fit."""

import json
import shutil

import pytest
import torch
from checkpoints import random_tokens
from safetensors.torch import load_file, save_file

from vllm_dms.adapters import (
    adapted_config,
    check_against_base,
    find_adapter_tensors,
    is_adapter_dir,
    nvidia_keys,
    read_adapter,
    write_adapter,
)
from vllm_dms.config import DMSConfig
from vllm_dms.reference import ReferenceModel

PROJ = "model.layers.0.self_attn.dms_proj_alpha.weight"


@pytest.fixture
def split(checkpoint, tmp_path):
    """-> a whole adapter checkpoint, the same as a base and an adapter directory."""
    whole, base, adapter = checkpoint("nvidia-adapter"), tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(whole, base)
    config = json.loads((whole / "config.json").read_text())
    dense = {k: v for k, v in config.items() if not k.startswith("dms_")}
    (base / "config.json").write_text(json.dumps(dense | {"architectures": ["Qwen3ForCausalLM"]}))
    weights = load_file(whole / "model.safetensors")
    names = find_adapter_tensors(weights)
    save_file({n: w for n, w in weights.items() if n not in names}, base / "model.safetensors")
    keys = nvidia_keys(DMSConfig.from_checkpoint(config), tau=0.1)
    write_adapter(adapter, keys, {n: weights[n] for n in names}, "../base", dense)
    return whole, base, adapter


def change(adapter, rename=lambda name: name, drop=(), add=None, **config):
    """The adapter directory, rewritten."""
    tensors = load_file(adapter / "adapter.safetensors")
    tensors = {rename(n): t for n, t in tensors.items() if n not in drop} | (add or {})
    save_file(tensors, adapter / "adapter.safetensors")
    path = adapter / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def base_config(base):
    return json.loads((base / "config.json").read_text())


def test_base_and_adapter_are_the_whole_checkpoint(split):
    whole, base, adapter = split
    ids = random_tokens(200, seed=1)
    truth = ReferenceModel.from_dir(whole).forward(ids)
    for model in (
        ReferenceModel.from_dir(base, adapter=adapter),
        ReferenceModel.from_dir(adapter),  # names its base, beside it
    ):
        found = model.forward(ids)
        assert torch.equal(found.logits, truth.logits) and torch.equal(found.evict, truth.evict)
    assert truth.evict.any()
    assert ReferenceModel.from_dir(base).dms is None
    assert ReferenceModel.from_dir(base, {"evict": False}, adapter).dms.evict is False


def test_what_was_written_is_read(split):
    whole, _, adapter = split
    found = read_adapter(adapter)
    weights = load_file(whole / "model.safetensors")
    assert set(found.tensors) == set(find_adapter_tensors(weights))
    assert all(torch.equal(t, weights[n]) for n, t in found.tensors.items())
    assert found.base == "../base"
    assert found.settings["dms_window_size"] == 16 and found.settings["dms_cr"] == 8
    assert found.described == {
        "model_type": "qwen3",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
    }
    assert is_adapter_dir(adapter) and not is_adapter_dir(whole)


@pytest.mark.parametrize(
    "prefix", ["", "model.", "base_model.model.model.", "model.language_model.", "student."]
)
def test_any_prefix_is_known(split, prefix):
    _, base, adapter = split
    change(adapter, lambda name: prefix + name.removeprefix("model."))
    found = read_adapter(adapter)
    check_against_base(found, base_config(base))
    assert PROJ in found.tensors


def test_settings_may_have_a_file_of_their_own(split):
    _, _, adapter = split
    config = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").unlink()
    (adapter / "dms_config.json").write_text(json.dumps(config | {"dms_window_size": 99}))
    assert read_adapter(adapter).settings["dms_window_size"] == 99


def test_only_adapter_tensors_are_found():
    names = [
        PROJ,
        "model.layers.11.self_attn.dms_proj_alpha_norm.weight",
        "model.layers.1.self_attn.dms_proj_alpha.bias",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.x.self_attn.dms_proj_alpha.weight",
        "model.layers.1.self_attn.dms_proj_alpha.weight_scale",
    ]
    assert list(find_adapter_tensors(names)) == names[:3]
    with pytest.raises(ValueError, match="under two prefixes"):
        find_adapter_tensors([PROJ, "student." + PROJ])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": [PROJ]}, r"lacks 1 of 4 tensors, first model\.layers\.0"),
        (
            {"add": {PROJ.replace("0", "7"): torch.zeros(2, 128)}},
            "1 tensors for which the base has no layer",
        ),
        ({"add": {PROJ: torch.zeros(3, 128)}}, r"has shape \(3, 128\), the base needs \(2, 128\)"),
        (
            {"add": {PROJ.replace("weight", "bias"): torch.zeros(2)}},
            r"lacks 1 of 6 tensors, first model\.layers\.1.*bias",
        ),
        ({"hidden_size": 256}, "a model with hidden_size 256, this one has 128"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, this one has 2"),
        ({"model_type": "llama"}, "model_type llama, this one has qwen3"),
    ],
    ids=["missing", "left over", "shape", "bias", "size", "layers", "family"],
)
def test_an_adapter_of_another_model_is_refused(split, changes, message):
    _, base, adapter = split
    change(adapter, **changes)
    with pytest.raises(ValueError, match=message) as error:
        check_against_base(read_adapter(adapter), base_config(base))
    assert "Use it over ../base" in str(error.value)
    with pytest.raises(ValueError, match=message):
        ReferenceModel.from_dir(base, adapter=adapter)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (
            torch.tensor([[1.0, float("nan")]]).expand(2, -1).repeat(1, 64),
            "float32, with 128 of 256",
        ),
        (torch.full((2, 128), float("inf"), dtype=torch.bfloat16), "bfloat16, with 256 of 256"),
        (torch.zeros(2, 128, dtype=torch.int8), "int8, with 0 of 256"),
    ],
    ids=["nan", "inf", "int8"],
)
def test_an_adapter_of_anything_but_finite_numbers_is_refused(split, tensor, found):
    _, base, adapter = split
    change(adapter, add={PROJ: tensor})
    with pytest.raises(ValueError, match=f"layers.0.*{found} that are not.*another copy"):
        check_against_base(read_adapter(adapter), base_config(base))


def test_directories_that_are_no_adapter_are_refused(split, tmp_path):
    whole, base, adapter = split
    for path, message in [
        (tmp_path / "nothing", "no such directory"),
        (base, "no .safetensors file there has tensors named"),
        (whole, "tensors that no adapter has, first"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_adapter(path)
    with pytest.raises(ValueError, match="has DMS keys of its own"):
        adapted_config(read_adapter(adapter), base_config(whole))
    change(adapter, dms_separate_alpha=False)
    with pytest.raises(ValueError, match="dms_separate_alpha is False"):
        adapted_config(read_adapter(adapter), base_config(base))


@pytest.mark.parametrize(
    ("name", "message"), [(None, "does not name its base"), ("Some/Model", "no directory here")]
)
def test_an_adapter_alone_needs_a_base_on_disk(split, name, message):
    _, _, adapter = split
    change(adapter, base_model_name_or_path=name)
    with pytest.raises(ValueError, match=message):
        ReferenceModel.from_dir(adapter)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("adapter.safetensors", None, "cut short"),
        ("config.json", b"{dms_", "is no JSON"),
    ],
    ids=["a pointer", "half of it", "no JSON"],
)
def test_a_file_that_can_not_be_read_is_named(split, tmp_path, name, content, message):
    copy = shutil.copytree(split[2], tmp_path / "copy")
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        read_adapter(copy)
