"""Everything the rest of the plugin knows about a DMS checkpoint: one frozen DMSConfig.

It is read from the checkpoint's own files, corrected by the user's overrides, and refuses what
it doesn't understand: a wrong window or shift evicts the wrong tokens without any other symptom.
Pure Python, so that the scheduler's process and the command line can import it freely.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from vllm_dms.models.families import FAMILIES, family_of_architectures

Dialect = Literal["nvidia-borrowed", "nvidia-adapter", "fastdms"]

SUPPORTED_FORMATS = (
    f"Supported DMS checkpoints ({', '.join(family.name for family in FAMILIES)}): "
    "NVIDIA borrowed-channel (dms_window_size, dms_alpha_scale and dms_initial_alpha_offset in "
    "config.json, like nvidia/Qwen3-8B-DMS-8x); "
    "NVIDIA adapter (the same with dms_separate_alpha: true and self_attn.dms_proj_alpha* weights, "
    "as Model-Optimizer trains); FastDMS (window_size, alpha_scale and alpha_offset in "
    "dms_metadata.json or config.json, like shisa-ai/Llama-3.2-1B-DMS-8x)."
)
SUPPORTED_ARCHITECTURES = tuple(family.architecture for family in FAMILIES)

# Where each format keeps what; True: there is no safe default, so it must be there.
_NVIDIA_KEYS = {
    "window": ("dms_window_size", True),
    "alpha_scale": ("dms_alpha_scale", True),
    "alpha_offset": ("dms_initial_alpha_offset", True),
    "alpha_per": ("dms_alpha_per", False),
    "nominal_ratio": ("dms_cr", False),
}
_FASTDMS_KEYS = {
    "window": ("window_size", True),
    "alpha_scale": ("alpha_scale", True),
    "alpha_offset": ("alpha_offset", True),
    "nominal_ratio": ("target_cr", False),
}
# Settings of Hugging Face's own run time, and of training: no meaning for serving here.
_NVIDIA_IGNORED = (
    "dms_tau",
    "dms_paged_attention_block_size",
    "dms_compile_limit",
    "dms_manual_inference_mode",
    "dms_chunked_prefill",
    "dms_preallocate_for_tokens",
)
_NVIDIA_SWITCHES = ("dms_separate_alpha", "dms_disable_eviction")
_NVIDIA_KNOWN = (*(k for k, _ in _NVIDIA_KEYS.values()), *_NVIDIA_SWITCHES, *_NVIDIA_IGNORED)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # True is an int in Python


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _one_of(*choices: Any):
    # By type as well: True == 1 in Python, and 1.0 == 1.
    return (lambda v: any(type(v) is type(c) and v == c for c in choices)), f"one of {choices}"


# Field name: (test, what it asks for). The only place where values are judged.
_RULES = {
    "dialect": _one_of(*get_args(Dialect)),
    "window": (lambda v: _is_int(v) and v >= 1, "a whole number of tokens, at least 1"),
    "alpha_scale": (lambda v: _is_number(v) and v != 0, "a finite number other than 0"),
    "alpha_offset": (_is_number, "a finite number"),
    "shift": _one_of(0, 1),
    "alpha_per": _one_of("head", "layer"),
    "evict": _one_of(True, False),
    "nominal_ratio": (
        lambda v: v is None or (_is_number(v) and v >= 1),
        "a number of at least 1, or absent",
    ),
    "storage": _one_of("model", "fp8"),
    "reserve_compression": (lambda v: _is_number(v) and v >= 1, "a number of at least 1"),
    "page_size": (
        lambda v: v is None or (_is_int(v) and v >= 8 and v & (v - 1) == 0),
        "a power of two of at least 8, or null for automatic",
    ),
    "kernels": _one_of("auto", "triton", "torch"),
    "log_interval": (lambda v: _is_number(v) and v >= 0, "seconds, 0 for never"),
}


def _check(field: str, value: Any, where: str, remedy: str) -> Any:
    test, requirement = _RULES[field]
    if not test(value):
        raise ValueError(f"{where} is {value!r}, but it must be {requirement}. {remedy}")
    return value


@dataclass(frozen=True)
class DMSConfig:
    """A checkpoint's eviction rule and how to serve it. Every field is checked on construction."""

    dialect: Dialect
    window: int  # W: keys with i - j <= W are always visible
    alpha_scale: float
    alpha_offset: float
    shift: int  # 1: token j's fate is decided by token j + 1 (NVIDIA); 0: by itself (FastDMS)
    alpha_per: Literal["head", "layer"] = "head"
    evict: bool = True  # False keeps every token: the control arm
    nominal_ratio: float | None = None  # the compression the checkpoint was trained for
    storage: Literal["model", "fp8"] = "model"  # "model": K/V in the model's own dtype
    reserve_compression: float = 1.0  # compression that the max_model_len check may count on
    page_size: int | None = None  # slots per leaf page; None: chosen by the layout
    kernels: Literal["auto", "triton", "torch"] = "auto"
    log_interval: float = 10.0  # seconds between compression lines; 0: none

    def __post_init__(self) -> None:
        for f in fields(self):
            _check(f.name, getattr(self, f.name), f"DMSConfig.{f.name}", "Pass a valid value.")

    @property
    def adapter(self) -> bool:
        """True: decisions come from extra weights; False: from a borrowed query channel."""
        return self.dialect == "nvidia-adapter"

    @classmethod
    def from_checkpoint(
        cls,
        hf_config: Any,
        metadata: Mapping | None = None,
        overrides: Mapping | None = None,
        storage: str = "model",
    ) -> "DMSConfig | None":
        """hf_config: config.json, as a mapping or a PretrainedConfig; metadata: dms_metadata.json,
        if there is one; overrides: the "dms" part of --additional-config.
        None: not a DMS checkpoint. ValueError: one that can't be served as it is.
        """
        config = dict(hf_config if isinstance(hf_config, Mapping) else hf_config.to_dict())
        overrides = _checked_overrides(overrides)
        nvidia = {k: v for k, v in config.items() if k.startswith("dms_")}
        fastdms, where = _fastdms_section(config, metadata)
        if not nvidia and fastdms is None:
            return None
        if nvidia and fastdms is not None:
            raise ValueError(
                f"config.json has NVIDIA's DMS keys ({', '.join(sorted(nvidia))}) and {where} has "
                "FastDMS's: they disagree on which token decides. Remove one of the two."
            )
        _check_architecture(config)
        if fastdms is not None:
            values: dict[str, Any] = {"dialect": "fastdms", "shift": 0}
            values |= _read_keys(fastdms, _FASTDMS_KEYS, where, overrides)
        else:
            values = _nvidia_values(nvidia, overrides)
        return cls(**{**values, **overrides, "storage": storage})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "DMSConfig":
        """The inverse of to_dict, also after a trip through JSON."""
        return cls(**values)


# Whatever the checkpoint decides or serving can choose; the dialect is a fact about the weights,
# the storage is chosen with --kv-cache-dtype.
OVERRIDES = tuple(f.name for f in fields(DMSConfig) if f.name not in ("dialect", "storage"))


def weight_suffixes(dms: DMSConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names, below model.layers.N, of each layer's DMS weights: (required, optional)."""
    if not dms.adapter:
        return (), ()
    proj = "self_attn.dms_proj_alpha"
    return (f"{proj}.weight", f"{proj}_norm.weight"), (f"{proj}.bias",)


def _checked_overrides(overrides: Mapping | None) -> dict[str, Any]:
    if overrides is None:
        return {}
    where = '"dms" in --additional-config'
    if not isinstance(overrides, Mapping):
        raise ValueError(f"{where} is {overrides!r}, but it must be a JSON object.")
    unknown = sorted(set(overrides) - set(OVERRIDES))
    if unknown:
        raise ValueError(
            f"{where} has unknown settings: {', '.join(map(str, unknown))}. "
            f"Valid ones are: {', '.join(OVERRIDES)}."
        )
    for field, value in overrides.items():
        _check(field, value, f"{where}: {field}", "Correct or remove the setting.")
    return dict(overrides)


def _check_architecture(config: Mapping) -> None:
    names = config.get("architectures") or []
    if names and family_of_architectures(names) is None:
        raise ValueError(
            f"architectures is {names}: DMS is not implemented for it. {SUPPORTED_FORMATS}"
        )


def _fastdms_section(config: Mapping, metadata: Mapping | None) -> tuple[Mapping | None, str]:
    """The mapping that holds FastDMS's keys (None: there is none) and a name for messages."""
    if metadata is not None:
        if not isinstance(metadata, Mapping):
            raise ValueError(
                f"dms_metadata.json holds {metadata!r}, but it must be a JSON object. Restore it."
            )
        for name in ("dms", "config"):
            if isinstance(metadata.get(name), Mapping):
                return metadata[name], f'dms_metadata.json ("{name}")'
        return metadata, "dms_metadata.json"
    for section, where in (
        (config, "config.json"),
        (config.get("dms"), 'config.json ("dms")'),
        (config.get("config"), 'config.json ("config")'),
    ):
        # Other models have a window_size of their own: only these two together mean DMS.
        if isinstance(section, Mapping) and {"alpha_scale", "alpha_offset"} <= set(section):
            return section, where
    return None, ""


def _nvidia_values(nvidia: Mapping, overrides: Mapping) -> dict[str, Any]:
    unknown = sorted(set(nvidia) - set(_NVIDIA_KNOWN))
    if unknown:
        raise ValueError(
            f"config.json has unknown DMS keys: {', '.join(unknown)}. They may change which tokens "
            f"are evicted. Remove or correct them; known keys: {', '.join(_NVIDIA_KNOWN)}."
        )
    for key in _NVIDIA_SWITCHES:
        if not isinstance(nvidia.get(key, False), bool):
            raise ValueError(
                f"config.json: {key} is {nvidia[key]!r}, but it must be true or false. "
                "Correct it in config.json."
            )
    adapter = nvidia.get("dms_separate_alpha", False)
    return {
        "dialect": "nvidia-adapter" if adapter else "nvidia-borrowed",
        "shift": 1,
        "evict": not nvidia.get("dms_disable_eviction", False),
        **_read_keys(nvidia, _NVIDIA_KEYS, "config.json", overrides),
    }


def _read_keys(source: Mapping, keys: Mapping, where: str, overrides: Mapping) -> dict[str, Any]:
    """Checkpoint values by field name; what the user overrides is not looked at."""
    values = {}
    for field, (key, required) in keys.items():
        if field in overrides:
            continue
        setting = f"""--additional-config '{{"dms": {{"{field}": ...}}}}'"""
        if key in source:
            remedy = f"Correct it, or set {setting}."
            values[field] = _check(field, source[key], f"{where}: {key}", remedy)
        elif required:
            raise ValueError(
                f"{where}: {key} is missing: without it nobody can tell which tokens this "
                f"checkpoint evicts. Restore it, or set {setting}."
            )
    return values
