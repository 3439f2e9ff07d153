"""DMSConfig: what is read from which checkpoint, and what is refused with which words."""

import dataclasses
import json
import math

import pytest
from rules import (
    ADAPTER,
    BORROWED,
    FASTDMS,
    LLAMA,
    NVIDIA,
    RUN_TIME,
    UNSHIFTED,
    changed,
    check_refused,
    without,
)
from transformers import LlamaConfig, Qwen3Config

from vllm_dms.config import OVERRIDES, DMSConfig
from vllm_dms.models.families import FAMILIES

ACCEPTED = {
    "nvidia, only the required keys": (NVIDIA, None, BORROWED),
    "nvidia, as on the hub": (NVIDIA | RUN_TIME, None, changed(BORROWED, nominal_ratio=8)),
    "nvidia, integer scale": (NVIDIA | {"dms_alpha_scale": 100}, None, BORROWED),
    "nvidia, borrowed said aloud": (NVIDIA | {"dms_separate_alpha": False}, None, BORROWED),
    "nvidia, layer": (
        NVIDIA | {"dms_alpha_per": "layer"},
        None,
        changed(BORROWED, alpha_per="layer"),
    ),
    "nvidia, off": (NVIDIA | {"dms_disable_eviction": True}, None, changed(BORROWED, evict=False)),
    "nvidia on llama": (NVIDIA | LLAMA, None, BORROWED),
    "adapter": (
        NVIDIA | {"architectures": ["Qwen3ForCausalLMDMS"], "dms_separate_alpha": True},
        None,
        ADAPTER,
    ),
    "adapter on llama": (
        NVIDIA | {"architectures": ["LlamaForCausalLMDMS"], "dms_separate_alpha": True},
        None,
        ADAPTER,
    ),
    **{
        f"an export of {family.name} without {what}": (
            NVIDIA | {"architectures": names, "model_type": family.model_type},
            None,
            BORROWED,
        )
        for family in FAMILIES
        for what, names in [
            ("architectures", None),
            ("any", []),
            ("a head", [family.architecture.replace("ForCausalLM", "Model")]),
        ]
    },
    "plain qwen3": ({"architectures": ["Qwen3ForCausalLM"]}, None, None),
    "plain model of any kind": ({"architectures": ["WhisperModel"]}, None, None),
    "another model's window_size": (LLAMA | {"window_size": 7}, None, None),
    "another model's alpha_scale": (LLAMA | {"window_size": 7, "alpha_scale": 1.0}, None, None),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_checkpoint_files_are_read_as(case):
    files, metadata, expected = ACCEPTED[case]
    assert DMSConfig.from_checkpoint(files, metadata) == expected


# Case: (config.json, dms_metadata.json, overrides, words that the message must have).
REFUSED = {
    **{
        f"nvidia without {key}": (without(NVIDIA, key), None, None, [key, "missing", override])
        for key, override in [
            ("dms_window_size", '"window"'),
            ("dms_alpha_scale", '"alpha_scale"'),
            ("dms_initial_alpha_offset", '"alpha_offset"'),
        ]
    },
    "an architecture without a row": (
        NVIDIA | {"architectures": ["Qwen3ForSequenceClassification"], "model_type": "qwen3"},
        None,
        None,
        ["Qwen3ForSequenceClassification", "--hf-overrides"],
    ),
    "a model_type without a row": (
        NVIDIA | {"architectures": None, "model_type": "gemma"},
        None,
        None,
        ["gemma", "--hf-overrides"],
    ),
    "zero for an adapter": (
        NVIDIA | {"dms_separate_alpha": True},
        None,
        {"zero": "never"},
        ['"zero"', "adapter"],
    ),
    **{
        f"{key} is {value!r}": (NVIDIA | {key: value}, None, None, [key, repr(value)])
        for key, value in [
            ("dms_window_size", True),
            ("dms_window_size", "512"),
            ("dms_window_size", 512.0),
            ("dms_window_size", -1),
            ("dms_window_size", 0),
            ("dms_window_size", None),
            ("dms_alpha_scale", "100"),
            ("dms_alpha_scale", math.nan),
            ("dms_alpha_scale", math.inf),
            ("dms_alpha_scale", 0.0),
            ("dms_alpha_scale", True),
            ("dms_initial_alpha_offset", math.nan),
            ("dms_initial_alpha_offset", None),
            ("dms_alpha_per", "token"),
            ("dms_alpha_per", None),
            ("dms_cr", 0.5),
            ("dms_cr", "8"),
            ("dms_separate_alpha", None),
            ("dms_separate_alpha", "true"),
            ("dms_separate_alpha", 1),
            ("dms_disable_eviction", 0),
        ]
    },
    "unknown nvidia key": (
        NVIDIA | {"dms_windowsize": 5},
        None,
        None,
        ["dms_windowsize", "known keys"],
    ),
    "unsupported architecture": (
        NVIDIA | {"architectures": ["GemmaForCausalLM"]},
        None,
        None,
        ["GemmaForCausalLM", "Supported DMS checkpoints"],
    ),
    "unknown override": (NVIDIA, None, {"windoww": 5}, ["windoww", *OVERRIDES]),
    "overrides are no object": (NVIDIA, None, True, ["--additional-config", "JSON object"]),
    **{
        f"override {key} is {value!r}": (NVIDIA, None, {key: value}, [key, repr(value)])
        for key, value in [
            ("window", True),
            ("window", "16"),
            ("shift", 2),
            ("shift", True),
            ("evict", "no"),
            ("evict", 0),
            ("alpha_per", "query"),
            ("zero", "after"),
            ("zero", False),
            ("kernels", "cuda"),
            ("page_size", 12),
            ("page_size", 4),
            ("page_size", 16.0),
            ("reserve_compression", 0.5),
            ("reserve_compression", math.nan),
            ("log_interval", -1),
            ("nominal_ratio", 0),
        ]
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_odd_checkpoints_and_settings_are_refused_by_name(case):
    check_refused(*REFUSED[case])


@pytest.mark.parametrize(
    "overrides",
    [
        {"window": 32, "alpha_scale": 2, "alpha_offset": -1.5, "shift": 0},
        {"evict": False, "alpha_per": "layer", "nominal_ratio": None},
        {"zero": "before"},
        {"reserve_compression": 4, "page_size": 64, "kernels": "torch", "log_interval": 0},
    ],
)
def test_overrides_win_over_the_checkpoint(overrides):
    config = NVIDIA | RUN_TIME
    expected = changed(DMSConfig.from_checkpoint(config), **overrides)
    assert DMSConfig.from_checkpoint(config, None, overrides) == expected


def test_an_override_replaces_a_missing_or_bad_key():
    config = without(NVIDIA, "dms_window_size") | {"dms_alpha_scale": "?"}
    overrides = {"window": 512, "alpha_scale": 100.0}
    read = DMSConfig.from_checkpoint(config, None, overrides)
    assert read == BORROWED


def test_overrides_do_not_turn_a_plain_model_into_a_dms_one():
    assert DMSConfig.from_checkpoint(LLAMA, None, {"window": 16}) is None


def test_storage_comes_from_the_cache_dtype_and_not_from_overrides():
    assert DMSConfig.from_checkpoint(NVIDIA, storage="fp8").storage == "fp8"
    with pytest.raises(ValueError, match="storage"):
        DMSConfig.from_checkpoint(NVIDIA, None, {"storage": "fp8"})
    with pytest.raises(ValueError, match="int3"):
        DMSConfig.from_checkpoint(NVIDIA, storage="int3")


def test_configs_parsed_by_transformers_read_like_their_json():
    qwen = Qwen3Config(**NVIDIA, **RUN_TIME)
    assert DMSConfig.from_checkpoint(qwen) == DMSConfig.from_checkpoint(NVIDIA | RUN_TIME)
    assert DMSConfig.from_checkpoint(LlamaConfig(**LLAMA), FASTDMS) == UNSHIFTED
    assert DMSConfig.from_checkpoint(LlamaConfig(**LLAMA)) is None


@pytest.mark.parametrize("config", [BORROWED, ADAPTER, changed(UNSHIFTED, page_size=32)])
def test_a_trip_through_json_changes_nothing(config):
    assert DMSConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_config_is_checked_however_it_is_made_and_cannot_be_changed():
    with pytest.raises(ValueError, match="window"):
        changed(BORROWED, window=-3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        BORROWED.window = 3
