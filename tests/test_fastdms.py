"""FastDMS checkpoints: settings in dms_metadata.json, in config.json, or in both."""

import pytest
from rules import (
    FASTDMS,
    FASTDMS_DOC,
    LLAMA,
    NVIDIA,
    NVIDIA_RULE,
    UNSHIFTED,
    changed,
    check_refused,
    without,
)

from vllm_dms import config
from vllm_dms.config import DMSConfig

IN_CONFIG = {"dms_window_size": 256, "dms_alpha_scale": 100.0, "dms_alpha_offset": 5.0, "dms_cr": 8}
SCHEMA_1 = {
    "schema_version": 1,
    "decision_source": "borrowed_query_channel_v1",
    "borrowed_query_channel": 63,
    "zero_borrowed_query_channel": True,
    "model_family": "llama",
    "num_layers": 16,
    "trained_checkpoint": True,
}
SCHEMA_2 = {"schema_version": 2, "decision_source": "external_linear_sidecar_v1", "sidecar": {}}

ACCEPTED = {
    "fastdms, metadata": (LLAMA, FASTDMS | FASTDMS_DOC, changed(UNSHIFTED, nominal_ratio=8)),
    "fastdms, metadata under config": (LLAMA, {"config": FASTDMS, "steps": 1}, UNSHIFTED),
    "fastdms, metadata under dms": (LLAMA, {"dms": FASTDMS}, UNSHIFTED),
    "fastdms, in config.json": (LLAMA | FASTDMS, None, UNSHIFTED),
    "fastdms, in config.json under dms": (LLAMA | {"dms": FASTDMS}, None, UNSHIFTED),
    "fastdms, in both places": (LLAMA | IN_CONFIG, FASTDMS, changed(UNSHIFTED, nominal_ratio=8)),
    "fastdms, nvidia's names in config.json": (
        LLAMA | NVIDIA_RULE | {"dms_window_size": 256},
        FASTDMS | FASTDMS_DOC | {"target_cr": 4},
        changed(UNSHIFTED, nominal_ratio=4),
    ),
    "fastdms, by its own key in config.json": (
        LLAMA | IN_CONFIG,
        None,
        changed(UNSHIFTED, nominal_ratio=8),
    ),
    "fastdms, nvidia's names in the metadata": (
        LLAMA,
        NVIDIA_RULE | {"dms_cr": 8},
        changed(UNSHIFTED, window=512, nominal_ratio=8),
    ),
    "fastdms, only a ratio in the metadata": (
        LLAMA,
        {"target_cr": 8},
        changed(UNSHIFTED, nominal_ratio=8),
    ),
    "fastdms, its trainer's log": (
        LLAMA,
        {
            "config": FASTDMS | {"model": "x", "zeroing_steps": 2000, "lr": 1e-5},
            "log": [{"step": 1}],
        },
        UNSHIFTED,
    ),
    "fastdms, schema 1": (LLAMA | {"head_dim": 64}, FASTDMS | SCHEMA_1, UNSHIFTED),
    "fastdms, channel not zeroed": (
        LLAMA,
        FASTDMS | {"zero_borrowed_query_channel": False},
        changed(UNSHIFTED, zero="never"),
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_its_files_are_read_as(case):
    files, metadata, expected = ACCEPTED[case]
    assert DMSConfig.from_checkpoint(files, metadata) == expected


# Case: (config.json, dms_metadata.json, overrides, words that the message must have).
REFUSED = {
    **{
        f"fastdms, places that disagree on {key}": (
            LLAMA | IN_CONFIG | {f"dms_{key}": 17.0 if key != "window_size" else 17},
            FASTDMS,
            None,
            [f"dms_metadata.json: {key} is {FASTDMS[key]}", f"config.json: dms_{key} is 17"],
        )
        for key in FASTDMS
    },
    "fastdms and an adapter": (
        LLAMA | IN_CONFIG | {"dms_separate_alpha": True},
        FASTDMS,
        None,
        ["dms_separate_alpha", "dms_metadata.json"],
    ),
    "fastdms's keys for qwen3": (NVIDIA | IN_CONFIG, None, None, ["unknown", "dms_alpha_offset"]),
    "schema 2": (LLAMA, FASTDMS | SCHEMA_2, None, ["schema_version is 2"]),
    "schema 2 around a section": (
        LLAMA,
        {"dms": FASTDMS} | SCHEMA_2,
        None,
        ["schema_version is 2"],
    ),
    "another source": (
        LLAMA,
        FASTDMS | without(SCHEMA_2, "schema_version"),
        None,
        ["decision_source is 'external_linear_sidecar_v1'", "borrowed_query_channel_v1"],
    ),
    "another channel": (LLAMA, FASTDMS | {"borrowed_query_channel": 5}, None, ["channel is 5"]),
    "unknown metadata key": (LLAMA, FASTDMS | {"evict_every": 2}, None, ["evict_every"]),
    "two formats at once": (NVIDIA, FASTDMS, None, ["dms_window_size", "dms_metadata.json"]),
    "empty metadata": (LLAMA, {}, None, ["dms_metadata.json", "window_size", "none"]),
    "metadata is a list": (LLAMA, [], None, ["dms_metadata.json", "JSON object"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_odd_files_of_it_are_refused_by_name(case):
    check_refused(*REFUSED[case])


def test_values_that_fastdms_would_assume_are_taken_with_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(config.logger, "warning", lambda text, *args: warnings.append(text % args))
    config._warn_of_default.cache_clear()
    for _ in range(2):
        read = DMSConfig.from_checkpoint(LLAMA, {"window_size": 64, "alpha_scale": 50.0})
    assert read == changed(UNSHIFTED, window=64, alpha_scale=50.0)
    (text,) = warnings
    assert "dms_metadata.json" in text and "alpha_offset" in text and "5.0" in text
