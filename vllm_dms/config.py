"""Everything the rest of the plugin knows about a DMS checkpoint: one frozen DMSConfig.

It is read from the checkpoint's own files, corrected by the user's overrides, and refuses what
it doesn't understand: a wrong window or shift evicts the wrong tokens without any other symptom.
Pure Python, so that the scheduler's process and the command line can import it freely.
"""

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from vllm_dms.formats import (
    FASTDMS_DEFAULTS,
    FASTDMS_KEYS,
    NVIDIA_KEYS,
    REQUIRED,
    Dialect,
    Rule,
    read_rule,
)

logger = logging.getLogger(__name__)


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
    "zero": _one_of("before", "both", "never"),
    "storage": _one_of("model", "fp8", "int4"),
    "reserve_compression": (lambda v: _is_number(v) and v >= 1, "a number of at least 1"),
    "page_size": (
        lambda v: v is None or (_is_int(v) and v >= 8 and v & (v - 1) == 0),
        "a power of two of at least 8, or null for automatic",
    ),
    "kernels": _one_of("auto", "triton", "flash", "torch"),
    "log_interval": (lambda v: _is_number(v) and v >= 0, "seconds, 0 for never"),
    "prefix_cache": _one_of(True, False),
    "adapter_dir": (lambda v: v is None or isinstance(v, str), "a directory"),
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
    zero: Literal["before", "both", "never"] = "both"  # where, around RoPE, a borrowed channel is 0
    evict: bool = True  # False keeps every token: the control arm
    nominal_ratio: float | None = None  # the compression the checkpoint was trained for
    storage: Literal["model", "fp8", "int4"] = "model"  # "model": K/V in the model's own dtype
    reserve_compression: float = 1.0  # compression that the max_model_len check may count on
    page_size: int | None = None  # slots per leaf page; None: chosen by the layout
    # "flash": Triton's, and vLLM's FlashAttention 3 within a chunk of a prompt
    kernels: Literal["auto", "triton", "flash", "torch"] = "auto"
    log_interval: float = 10.0  # seconds between compression lines; 0: none
    prefix_cache: bool = False  # states are kept, and found by requests that begin the same
    adapter_dir: str | None = None  # where adapter weights are, if not in the checkpoint

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
        rule = read_rule(config, metadata)
        if rule is None:
            return None
        if "zero" in overrides and rule.dialect == "nvidia-adapter":
            raise ValueError(
                '"zero" is set in "dms" in --additional-config, but this checkpoint has an adapter '
                "and borrows no query channel. Remove the setting."
            )
        values = {name: getattr(rule, name) for name in ("dialect", "shift", "zero", "evict")}
        return cls(**values | _read_values(rule, overrides) | overrides | {"storage": storage})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping) -> "DMSConfig":
        """The inverse of to_dict, also after a trip through JSON."""
        return cls(**values)


# Whatever the checkpoint decides or serving can choose; the dialect is a fact about the weights,
# the storage is chosen with --kv-cache-dtype, the adapter's directory with ADAPTER.
OVERRIDES = tuple(
    f.name for f in fields(DMSConfig) if f.name not in ("dialect", "storage", "adapter_dir")
)
# The settings beside them that name an adapter over an untouched base; `gates` resolves them.
ADAPTER, ADAPTER_REVISION = "adapter", "adapter_revision"


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
            f"Valid ones are: {', '.join((*OVERRIDES, ADAPTER, ADAPTER_REVISION))}."
        )
    for field, value in overrides.items():
        _check(field, value, f"{where}: {field}", "Correct or remove the setting.")
    return dict(overrides)


def _read_values(rule: Rule, overrides: Mapping) -> dict[str, Any]:
    """Checkpoint values by field name; what the user overrides is not looked at."""
    values = {}
    for field in {*rule.settings, *REQUIRED} - set(overrides):
        remedy = f"""set --additional-config '{{"dms": {{"{field}": ...}}}}'"""
        found = rule.settings.get(field, [])
        for setting in found:
            _check(field, setting.value, setting.where, f"Correct it, or {remedy}.")
        if found:
            first = found[0]
            other = next((s for s in found if s.value != first.value), first)
            if other is not first and field in REQUIRED:
                raise ValueError(
                    f"{first.where} is {first.value!r}, but {other.where} is {other.value!r}. "
                    f"Correct one of them, or {remedy}."
                )
            values[field] = first.value
        elif rule.dialect == "fastdms":
            values[field] = FASTDMS_DEFAULTS[field]
            _warn_of_default(rule.where, field)
        else:
            raise ValueError(
                f"{rule.where}: {NVIDIA_KEYS[field][0]} is missing: without it nobody can tell "
                f"which tokens this checkpoint evicts. Restore it, or {remedy}."
            )
    return values


@functools.cache
def _warn_of_default(where: str, field: str) -> None:
    logger.warning(
        "%s does not have %s: FastDMS's own default of %s is taken.",
        where,
        FASTDMS_KEYS[field][0],
        FASTDMS_DEFAULTS[field],
    )
