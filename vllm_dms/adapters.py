"""Adapter directories: a checkpoint's decisions alone, over an untouched base model.

  adapter.safetensors  each layer's dms_proj_alpha and dms_proj_alpha_norm (2.7 MB for Qwen3-8B)
  config.json          NVIDIA's dms_* keys, the sizes of the base, and its name
  README.md            base, ratio, data and evaluation, for people

The only module that reads or writes this form; the retrofit, `verify`, the reference and the
server share it. It needs neither vLLM nor transformers.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_dms.config import DMSConfig

WEIGHTS, CONFIG, README = "adapter.safetensors", "config.json", "README.md"
# Where others keep the dms_* keys; a later file wins.
CONFIGS = (CONFIG, "dms_config.json")
BASE_KEYS = ("base_model_name_or_path", "_name_or_path")
# What of the base's config is kept, to know it again: key -> what it counts.
SIZES = {
    "hidden_size": "hidden size",
    "num_hidden_layers": "layers",
    "num_key_value_heads": "heads",
}
# Any prefix: model., model.language_model., base_model.model.model., student., ...
_TENSOR = re.compile(
    r"(?:^|.*\.)layers\.(\d+)\.(self_attn\.dms_proj_alpha(?:\.weight|\.bias|_norm\.weight))$"
)
_SUFFIXES = ("self_attn.dms_proj_alpha.weight", "self_attn.dms_proj_alpha_norm.weight")
_BIAS = "self_attn.dms_proj_alpha.bias"


@dataclass(frozen=True)
class Adapter:
    path: Path
    settings: dict[str, Any]  # the dms_* keys
    tensors: dict[str, torch.Tensor]  # model.layers.N.self_attn.dms_proj_alpha..., whatever prefix
    base: str | None  # name or path of the model that it was trained over
    described: dict[str, Any]  # model_type and SIZES of that model, as far as they are told


def find_adapter_tensors(names: Iterable[str]) -> dict[str, str]:
    """Tensor names -> those of an adapter, with the name that they have in a whole checkpoint."""
    found, taken = {}, {}
    for name in names:
        match = _TENSOR.match(name)
        if match is None:
            continue
        found[name] = f"model.layers.{int(match[1])}.{match[2]}"
        other = taken.setdefault(found[name], name)
        if other != name:
            raise ValueError(
                f"{other} and {name} are the same adapter tensor under two prefixes: keep one."
            )
    return found


def tensor_names(path: Path) -> dict[str, Path]:
    """The names of all tensors in a directory's safetensors files, with their files."""
    names = {}
    for shard in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(shard, "pt") as file:
                names |= dict.fromkeys(file.keys(), shard)
        except SafetensorError as error:
            raise ValueError(
                f"{shard} can't be read: {error}. It may be cut short, or a pointer that Git LFS "
                "left in its place: download it again."
            ) from error
    return names


def is_adapter_dir(path: Path) -> bool:
    """True: adapter tensors and no others; a whole checkpoint has many more."""
    names = tensor_names(path)
    return bool(names) and len(find_adapter_tensors(names)) == len(names)


def read_adapter(path: Path | str) -> Adapter:
    """A local directory. Not yet held against a base: see check_against_base."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"adapter {path}: there is no such directory.")
    config: dict[str, Any] = {}
    for name in CONFIGS:
        if (path / name).is_file():
            config |= _read_object(path / name)
    files = tensor_names(path)
    names = find_adapter_tensors(files)
    if not names:
        raise ValueError(
            f"adapter {path}: no .safetensors file there has tensors named "
            "...layers.N.self_attn.dms_proj_alpha.weight."
        )
    left_over = sorted(set(files) - set(names))
    if left_over:
        raise ValueError(
            f"adapter {path} also has {len(left_over)} tensors that no adapter has, first "
            f"{left_over[0]}: if it is a whole checkpoint, use it as the model instead."
        )
    tensors = {}
    for shard in sorted(set(files.values())):
        with safe_open(shard, "pt") as file:
            tensors |= {names[n]: file.get_tensor(n) for n in names if files[n] == shard}
    return Adapter(
        path,
        {k: v for k, v in config.items() if k.startswith("dms_")},
        tensors,
        next((config[key] for key in BASE_KEYS if config.get(key)), None),
        {k: config[k] for k in ("model_type", *SIZES) if k in config},
    )


def _read_object(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}. Correct it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {value!r}, but it must be a JSON object.")
    return value


def check_against_base(adapter: Adapter, hf_config: Any) -> None:
    """hf_config: the base's config.json, as a mapping or a PretrainedConfig."""
    base = _described(hf_config)
    where = f"adapter {adapter.path}"
    remedy = f"Use it over {adapter.base}." if adapter.base else "Use it over its own base model."
    for key, value in adapter.described.items():
        if value is not None and value != base[key]:
            raise ValueError(
                f"{where} was trained over a model with {key} {value}, this one has {base[key]}. "
                + remedy
            )
    layers, heads, hidden = (
        base[k] for k in ("num_hidden_layers", "num_key_value_heads", "hidden_size")
    )
    with_bias = any(name.endswith(_BIAS) for name in adapter.tensors)
    shapes = {_SUFFIXES[0]: (heads, hidden), _SUFFIXES[1]: (hidden,)}
    shapes |= {_BIAS: (heads,)} if with_bias else {}
    expected = {f"model.layers.{i}.{s}": shapes[s] for i in range(layers) for s in shapes}
    missing = [name for name in expected if name not in adapter.tensors]
    if missing:
        raise ValueError(
            f"{where} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]}: "
            f"the base has {layers} layers. {remedy}"
        )
    left_over = sorted(set(adapter.tensors) - set(expected))
    if left_over:
        raise ValueError(
            f"{where} has {len(left_over)} tensors for which the base has no layer, first "
            f"{left_over[0]}: the base has {layers} layers. {remedy}"
        )
    for name, shape in expected.items():
        tensor = adapter.tensors[name]
        found = tuple(tensor.shape)
        if found != shape:
            raise ValueError(
                f"{where}: {name} has shape {found}, the base needs {shape} "
                f"({heads} KV heads, hidden size {hidden}). {remedy}"
            )
        # Of NaN no comparison is true: the head would evict nothing, and nobody would know.
        bad = int((~tensor.float().isfinite()).sum())
        if bad or not tensor.is_floating_point():
            raise ValueError(
                f"{where}: {name} must hold finite floating-point numbers, but is {tensor.dtype}, "
                f"with {bad} of {tensor.numel()} that are not. Its training or its download went "
                "wrong: use another copy."
            )


def _described(hf_config: Any) -> dict[str, Any]:
    config = dict(hf_config if isinstance(hf_config, Mapping) else hf_config.to_dict())
    kv_heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    return {
        "model_type": config.get("model_type"),
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_key_value_heads": kv_heads,
    }


def adapted_config(adapter: Adapter, hf_config: Any) -> dict[str, Any]:
    """The base's config with the adapter's dms_* keys: what a merged checkpoint's would say."""
    config = dict(hf_config if isinstance(hf_config, Mapping) else hf_config.to_dict())
    own = sorted(key for key in config if key.startswith("dms_"))
    if own:
        raise ValueError(
            f"the base of adapter {adapter.path} has DMS keys of its own ({', '.join(own)}): an "
            "adapter needs a base without DMS."
        )
    if adapter.settings.get("dms_separate_alpha", True) is not True:
        raise ValueError(
            f"adapter {adapter.path}: dms_separate_alpha is "
            f"{adapter.settings['dms_separate_alpha']!r}, but its tensors are an adapter's. Set it "
            "to true in its config.json."
        )
    return {**config, "dms_separate_alpha": True, **adapter.settings}


def nvidia_keys(dms: DMSConfig, tau: float) -> dict[str, Any]:
    """config.json's dms_* keys, as NVIDIA's own training writes them."""
    return {
        "dms_alpha_per": dms.alpha_per,
        "dms_alpha_scale": dms.alpha_scale,
        "dms_cr": dms.nominal_ratio,
        "dms_disable_eviction": False,
        "dms_initial_alpha_offset": dms.alpha_offset,
        "dms_separate_alpha": dms.adapter,
        "dms_tau": tau,
        "dms_window_size": dms.window,
    }


def write_adapter(
    out: Path,
    settings: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    base: str,
    hf_config: Any,
    readme: str = "",
) -> None:
    """settings: the dms_* keys; base and hf_config: name and config of the model under it."""
    out.mkdir(parents=True, exist_ok=True)
    found = find_adapter_tensors(tensors)
    contiguous = {found[name]: t.detach().cpu().contiguous() for name, t in tensors.items()}
    config = {**_described(hf_config), BASE_KEYS[0]: base, **settings}
    check_against_base(Adapter(out, dict(settings), contiguous, base, {}), hf_config)
    save_file(contiguous, out / WEIGHTS, {"format": "pt"})
    (out / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if readme:
        (out / README).write_text(readme)
