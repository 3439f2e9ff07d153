"""`{"dms": {"adapter": ...}}`: decisions from an adapter's directory over an untouched base."""

import json
import shutil

import pytest
from adapter_parts import split_adapter
from engines import engine_args, engine_config, generate, prompts, sampling
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def parts(checkpoint, tmp_path_factory):
    """A whole checkpoint; its base without a word of DMS; its adapter."""
    whole = checkpoint("nvidia-adapter", evict_rate=0.5)
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    split_adapter(whole, base, adapter)
    return whole, base, adapter


def over_base(adapter, **settings):
    return engine_args(96, additional_config={"dms": {"adapter": str(adapter), **settings}})


def log_probabilities(llm):
    outputs = generate(llm, prompts((20, 230, 700)), sampling())
    return [
        [{t: entry.logprob for t, entry in row.items()} for row in out.outputs[0].logprobs]
        for out in outputs
    ], [out.kv_transfer_params["dms"] for out in outputs]


def test_an_adapter_over_its_base_is_the_merged_checkpoint_bit_for_bit(make_engine, parts):
    whole, base, adapter = parts
    merged, figures = log_probabilities(make_engine(whole, **engine_args(96)))
    found, same = log_probabilities(make_engine(base, **over_base(adapter)))
    assert found == merged and same == figures
    assert figures[-1]["compression"] > 1.2


def test_an_adapter_alone_is_served_over_the_base_it_names(make_engine, parts, tmp_path):
    _, base, adapter = parts
    alone = shutil.copytree(adapter, tmp_path / "alone")
    config = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    llm = make_engine(alone, **engine_args(96))
    model = llm.llm_engine.vllm_config.model_config
    assert (model.model, model.served_model_name) == (str(base), str(alone))
    assert log_probabilities(llm) == log_probabilities(make_engine(base, **over_base(adapter)))
    del config["base_model_name_or_path"]
    (alone / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not name its base"):
        make_engine(alone, **engine_args(512))


def test_the_users_settings_win_over_the_adapters(make_engine, parts):
    _, base, adapter = parts
    llm = make_engine(base, **over_base(adapter, evict=False))
    assert log_probabilities(llm)[1][-1]["compression"] == 1.0


def broken(tmp_path, adapter, change):
    copy = shutil.copytree(adapter, tmp_path / "broken")
    weights = load_file(copy / "adapter.safetensors")
    config = json.loads((copy / "config.json").read_text())
    change(weights, config)
    save_file(weights, copy / "adapter.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w, c: w.pop("model.layers.1.self_attn.dms_proj_alpha.weight"), "lacks 1 of 4"),
        (lambda w, c: c.update(num_hidden_layers=36), "num_hidden_layers 36, this one has 2"),
        (lambda w, c: c.update(model_type="llama"), "model_type llama, this one has qwen3"),
        (lambda w, c: c.pop("dms_window_size"), "dms_window_size is missing"),
        (lambda w, c: w.update(other=w["model.layers.0.self_attn.dms_proj_alpha.weight"] * 1),
         "1 tensors that no adapter has"),
    ],
    ids=["a tensor less", "another size", "another family", "no window", "a tensor more"],
)  # fmt: skip
def test_what_does_not_fit_is_one_clear_error(make_engine, parts, tmp_path, change, named):
    _, base, adapter = parts
    with pytest.raises(ValueError, match=named):
        make_engine(base, **over_base(broken(tmp_path, adapter, change)))


def test_an_adapter_that_is_nowhere_is_an_error_that_says_where_it_was_looked_for(
    make_engine, parts
):
    _, base, _ = parts
    with pytest.raises(ValueError, match="no directory here, and as a repository"):
        make_engine(base, **over_base("somebody/no-such-adapter"))
    with pytest.raises(ValueError, match="Leave the revision out"):
        make_engine(base, **over_base(parts[2], adapter_revision="main"))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"adapter": ""}, "adapter is '', but"),
        ({"adapter": 5}, "adapter is 5, but"),
        ({"adapter": None}, "adapter is None, but"),
        ({"adapter": "somebody/adapter", "adapter_revision": 5}, "adapter_revision is 5, but"),
    ],
)
def test_a_setting_that_names_no_place_is_refused_before_anything_is_read(parts, settings, named):
    with pytest.raises(ValueError, match=named):
        engine_config(parts[1], additional_config={"dms": settings})


def test_a_base_with_decisions_of_its_own_is_refused(make_engine, parts):
    whole, _, adapter = parts
    with pytest.raises(ValueError, match="needs a base without DMS"):
        make_engine(whole, **over_base(adapter))
