"""Where each format of DMS checkpoints keeps its eviction rule, and what is refused in one.

NVIDIA keeps it in config.json, FastDMS in dms_metadata.json, in config.json, or in both. Nothing is
judged here but names: `config` judges values, and what the user overrides is never looked at.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vllm_dms.models.families import FAMILIES, family_of

Dialect = Literal["nvidia-borrowed", "nvidia-adapter", "fastdms"]

SUPPORTED_FORMATS = (
    f"Supported DMS checkpoints ({', '.join(family.name for family in FAMILIES)}): "
    "NVIDIA borrowed-channel (dms_window_size, dms_alpha_scale and dms_initial_alpha_offset in "
    "config.json, like nvidia/Qwen3-8B-DMS-8x); NVIDIA adapter (the same with dms_separate_alpha: "
    "true and self_attn.dms_proj_alpha* weights, as Model-Optimizer trains); FastDMS (window_size, "
    "alpha_scale and alpha_offset in dms_metadata.json or config.json, like "
    "shisa-ai/Llama-3.2-1B-DMS-8x)."
)

# Field of DMSConfig: its names in a format. What is required has no safe default.
NVIDIA_KEYS = {
    "window": ("dms_window_size",),
    "alpha_scale": ("dms_alpha_scale",),
    "alpha_offset": ("dms_initial_alpha_offset",),
    "alpha_per": ("dms_alpha_per",),
    "nominal_ratio": ("dms_cr",),
}
REQUIRED = ("window", "alpha_scale", "alpha_offset")
_NVIDIA_SWITCHES = ("dms_separate_alpha", "dms_disable_eviction")
# Settings of Hugging Face's own run time, and of training: no meaning for serving here.
_NVIDIA_IGNORED = (
    "dms_tau",
    "dms_paged_attention_block_size",
    "dms_compile_limit",
    "dms_manual_inference_mode",
    "dms_chunked_prefill",
    "dms_preallocate_for_tokens",
)
_NVIDIA_KNOWN = (
    *(k for keys in NVIDIA_KEYS.values() for k in keys),
    *_NVIDIA_SWITCHES,
    *_NVIDIA_IGNORED,
)

FASTDMS_KEYS = {
    "window": ("window_size", "dms_window_size"),
    "alpha_scale": ("alpha_scale", "dms_alpha_scale"),
    "alpha_offset": ("alpha_offset", "dms_alpha_offset", "dms_initial_alpha_offset"),
    "nominal_ratio": ("target_cr", "dms_cr", "target_compression_ratio"),
}
FASTDMS_DEFAULTS = {"window": 256, "alpha_scale": 100.0, "alpha_offset": 5.0}
_FASTDMS_OFFSET = "dms_alpha_offset"  # the one dms_ key that only FastDMS has
_FASTDMS_SOURCE = "borrowed_query_channel_v1"
# Of other keys of the metadata, those with such a name could change decisions.
_DECIDING = (
    "dms",
    "alpha",
    "evict",
    "window",
    "decision",
    "shift",
    "channel",
    "sidecar",
    "threshold",
)


@dataclass(frozen=True)
class Setting:
    value: Any
    where: str  # for messages: file and key


@dataclass(frozen=True)
class Rule:
    """What a checkpoint's files say. Values as they are there, by field of DMSConfig."""

    dialect: Dialect
    shift: int
    zero: str
    evict: bool
    where: str  # the file that has the rule, for messages
    settings: dict[str, list[Setting]]  # several: they must agree


def read_rule(config: Mapping, metadata: Any) -> Rule | None:
    """config: config.json; metadata: dms_metadata.json, if there is one. None: no DMS."""
    nvidia = {k: v for k, v in config.items() if k.startswith("dms_")}
    fastdms = _fastdms_sections(config, metadata)
    if not nvidia and not fastdms:
        return None
    family = family_of(config)
    named = config.get("architectures") or config.get("model_type")
    if named and family is None:
        raise ValueError(
            f"architectures is {config.get('architectures')} (model_type "
            f"{config.get('model_type')!r}): DMS is not implemented for it. If it is one of those "
            """below, say so: --hf-overrides '{"architectures": ["Qwen3ForCausalLM"]}'. """
            + SUPPORTED_FORMATS
        )
    may_be_fastdms = family is None or family.model_type == "llama"
    if fastdms and nvidia and not may_be_fastdms:
        raise ValueError(
            f"config.json has NVIDIA's DMS keys ({', '.join(sorted(nvidia))}) and {fastdms[0][1]} "
            "has FastDMS's: they disagree on which token decides. Remove one of the two."
        )
    if fastdms or (_FASTDMS_OFFSET in nvidia and may_be_fastdms):
        return _fastdms_rule(config, nvidia, [*fastdms, (nvidia, "config.json")])
    return _nvidia_rule(nvidia)


def _nvidia_rule(nvidia: Mapping) -> Rule:
    _refuse_unknown(nvidia, _NVIDIA_KNOWN)
    adapter = nvidia.get("dms_separate_alpha", False)
    return Rule(
        dialect="nvidia-adapter" if adapter else "nvidia-borrowed",
        shift=1,
        zero="both",
        evict=not nvidia.get("dms_disable_eviction", False),
        where="config.json",
        settings=_settings([(nvidia, "config.json")], NVIDIA_KEYS),
    )


def _fastdms_rule(config: Mapping, nvidia: Mapping, sections: list[tuple[Mapping, str]]) -> Rule:
    _refuse_unknown(nvidia, (*_NVIDIA_KNOWN, _FASTDMS_OFFSET))
    for key, plain in (("dms_separate_alpha", False), ("dms_alpha_per", "head")):
        if nvidia.get(key, plain) != plain:
            raise ValueError(
                f"config.json: {key} is {nvidia[key]!r}, which FastDMS does not have, but the "
                f"checkpoint has FastDMS's settings, too ({sections[0][1]}). Remove one of the two."
            )
    zero = "before"
    for section, where in sections:
        if where.startswith("dms_metadata.json"):
            _refuse_foreign(section, where, config)
            zero = "before" if section.get("zero_borrowed_query_channel", True) else "never"
    return Rule(
        dialect="fastdms",
        shift=0,
        zero=zero,
        evict=not nvidia.get("dms_disable_eviction", False),
        where=sections[0][1],
        settings=_settings(sections, FASTDMS_KEYS),
    )


def _settings(
    sections: Iterable[tuple[Mapping, str]], keys: Mapping[str, tuple[str, ...]]
) -> dict[str, list[Setting]]:
    """By field, all that the sections say of it, the most important first."""
    found = {
        field: [
            Setting(section[name], f"{where}: {name}")
            for section, where in sections
            for name in names
            if name in section
        ]
        for field, names in keys.items()
    }
    return {field: settings for field, settings in found.items() if settings}


def _fastdms_sections(config: Mapping, metadata: Any) -> list[tuple[Mapping, str]]:
    """The mappings that hold FastDMS's own keys, the deciding one first, and where they are."""
    sections = []
    if metadata is not None:
        if not isinstance(metadata, Mapping):
            raise ValueError(
                f"dms_metadata.json holds {metadata!r}, but it must be a JSON object. Restore it."
            )
        inner = next((n for n in ("dms", "config") if isinstance(metadata.get(n), Mapping)), None)
        if inner is None:
            sections.append((metadata, "dms_metadata.json"))
        else:
            outer = {k: v for k, v in metadata.items() if k not in ("dms", "config")}
            sections.append((outer | metadata[inner], f'dms_metadata.json ("{inner}")'))
    for section, where in (
        (config, "config.json"),
        (config.get("dms"), 'config.json ("dms")'),
        (config.get("config"), 'config.json ("config")'),
    ):
        # Other models have a window_size of their own: only these two together mean DMS.
        if isinstance(section, Mapping) and {"alpha_scale", "alpha_offset"} <= set(section):
            own = {k: v for k, v in section.items() if not k.startswith("dms_")}
            sections.append((own, where))
    return sections


def _refuse_unknown(nvidia: Mapping, known: tuple[str, ...]) -> None:
    unknown = sorted(set(nvidia) - set(known))
    if unknown:
        raise ValueError(
            f"config.json has unknown DMS keys: {', '.join(unknown)}. They may change which tokens "
            f"are evicted. Remove or correct them; known keys: {', '.join(known)}."
        )
    for key in _NVIDIA_SWITCHES:
        if not isinstance(nvidia.get(key, False), bool):
            raise ValueError(
                f"config.json: {key} is {nvidia[key]!r}, but it must be true or false. "
                "Correct it in config.json."
            )


def _refuse_foreign(section: Mapping, where: str, config: Mapping) -> None:
    """Metadata of another schema, or with keys that may change decisions."""
    last_channel = (None, -1, (config.get("head_dim") or 0) - 1)
    expected = {
        "schema_version": (None, 1),
        "decision_source": (None, _FASTDMS_SOURCE),
        "borrowed_query_channel": last_channel,
        "zero_borrowed_query_channel": (None, True, False),
    }
    for key, values in expected.items():
        if section.get(key) not in values:
            raise ValueError(
                f"{where}: {key} is {section[key]!r}, which is another way to decide: this plugin "
                "reads FastDMS's decisions from the last channel of each group's first query head "
                f"({_FASTDMS_SOURCE}, schema_version 1). Serve a checkpoint of that kind."
            )
    names = {name for aliases in FASTDMS_KEYS.values() for name in aliases}
    unknown = [k for k in section if k not in expected and k not in names]
    unknown = sorted(k for k in unknown if any(part in k for part in _DECIDING))
    if unknown:
        raise ValueError(
            f"{where} has unknown keys: {', '.join(unknown)}. They may change which tokens are "
            f"evicted. Remove or correct them; known keys: {', '.join(sorted(names))}."
        )
    if not names & set(section):
        raise ValueError(
            f"{where} has none of FastDMS's keys ({', '.join(sorted(names))}), so nobody can tell "
            "which tokens this checkpoint evicts. Restore it."
        )


def quantizes_kv_cache(hf_config: Any) -> bool:
    """Whether config.json asks for a quantized KV cache (compressed-tensors, modelopt)."""
    quantization = getattr(hf_config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    nested = quantization.get("quantization") or {}
    return any(
        section.get(key)
        for section in (quantization, nested)
        for key in ("kv_cache_scheme", "kv_cache_quant_algo")
    )
