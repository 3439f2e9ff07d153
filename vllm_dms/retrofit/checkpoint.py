"""Checkpoints in and out: a dense Hugging Face directory becomes one in NVIDIA's DMS formats."""

import json
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from vllm_dms.adapter_paths import weights_dir
from vllm_dms.adapters import (
    adapted_config,
    check_against_base,
    find_adapter_tensors,
    nvidia_keys,
    read_adapter,
    write_adapter,
)
from vllm_dms.config import DMSConfig
from vllm_dms.models.families import FAMILIES, family_of, family_of_architectures

# Everything else in a model directory that a server or a client reads.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
KNOWN = ", ".join(family.architecture for family in FAMILIES)
# Training state, kept beside the weights under names that transformers does not have.
ROWS = "dms_rows"


def check_dense(path: Path, length: int) -> PretrainedConfig:
    """Refuses other architectures, checkpoints that have DMS, and rows that are too long."""
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has no config.json: MODEL must be a directory in Hugging Face format."
        )
    config = AutoConfig.from_pretrained(path)
    if any(key.startswith("dms_") for key in config.to_dict()):
        raise ValueError(f"{path} is a DMS checkpoint already: start from the dense model.")
    names = config.architectures or []
    if family_of_architectures(names) is None:
        raise ValueError(f"architectures is {names}: the retrofit knows {KNOWN}.")
    layer_types = getattr(config, "layer_types", None) or ()
    # Mistral has one window for all layers, and no types of them.
    if "sliding_attention" in layer_types or (
        not layer_types and getattr(config, "sliding_window", None)
    ):
        raise ValueError(
            f"{path} has sliding-window layers: they have no use for DMS. Use a full-attention "
            "model."
        )
    positions = config.max_position_embeddings
    if length > positions:
        raise ValueError(
            f"--length is {length}, but the model knows {positions} positions: give at most "
            f"--length {positions}."
        )
    return config


def load_dense(path: Path, dtype: torch.dtype, length: int = 1) -> nn.Module:
    check_dense(path, length)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def load_dms(
    path: Path, dtype: torch.dtype, base: Path | None = None
) -> tuple[nn.Module, DMSConfig]:
    """A whole checkpoint, or an adapter's directory and its base (default: the one it names), with
    adapter weights where `forward` looks for them."""
    base = weights_dir(path, base)
    if not (base / "config.json").is_file():
        raise ValueError(f"{base} has no config.json: it is no model's directory.")
    raw, adapter = json.loads((base / "config.json").read_text()), None
    if base != path:
        adapter = read_adapter(path)
        check_against_base(adapter, raw)
        raw = adapted_config(adapter, raw)
    dms = DMSConfig.from_checkpoint(raw)
    if dms is None:
        raise ValueError(f"{path} has no dms_* keys in config.json: it is not a DMS checkpoint.")
    family = family_of(raw)
    if family is None:
        raise ValueError(f"architectures is {raw.get('architectures')}: only {KNOWN} are known.")
    config = AutoConfig.from_pretrained(base, architectures=[family.architecture])
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype)
    if dms.adapter:
        _add_adapters(model)
        found = adapter.tensors if adapter else _dms_weights(path)
        missing, _ = model.load_state_dict(found, strict=False)
        absent = [name for name in missing if "dms_" in name]
        if absent:
            raise ValueError(
                f"{path} lacks weights that its config.json promises: {', '.join(absent)}."
            )
        model.to(dtype)
    return model, dms


def _dms_weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    found = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            names = [name for name in tensors.keys() if "dms_" in name]  # noqa: SIM118 - no dict
            found |= {name: tensors.get_tensor(name) for name in names}
    return found


def _add_adapters(model: nn.Module) -> None:
    """Zero projections: every logit starts at -offset, so nothing is evicted."""
    config, device = model.config, model.device
    for layer in model.model.layers:
        attn = layer.self_attn
        # NVIDIA's class makes the bias follow the model's own attention_bias.
        attn.dms_proj_alpha = nn.Linear(
            config.hidden_size,
            config.num_key_value_heads,
            bias=bool(getattr(config, "attention_bias", False)),
            device=device,
        )
        nn.init.zeros_(attn.dms_proj_alpha.weight)
        if attn.dms_proj_alpha.bias is not None:
            nn.init.zeros_(attn.dms_proj_alpha.bias)
        attn.dms_proj_alpha_norm = type(layer.input_layernorm)(
            config.hidden_size, eps=config.rms_norm_eps
        ).to(device)


def _borrowed_rows(attn: nn.Module) -> slice:
    """Rows of q_proj that make the last channel of each group's first head."""
    stride = attn.num_key_value_groups * attn.head_dim
    return slice(attn.head_dim - 1, None, stride)


def prepare(model: nn.Module, dms: DMSConfig, train_all: bool) -> dict[str, nn.Parameter]:
    """Adds the decision parameters (fp32) and freezes the rest; -> what is trained, by name.

    The borrowed rows of q_proj start from zero. That loses what the channel did in attention, one
    channel in head_dim * group; only training all weights can win that back.
    """
    model.requires_grad_(train_all)
    if dms.adapter:
        _add_adapters(model)
    else:
        for layer in model.model.layers:
            attn = layer.self_attn
            with torch.no_grad():
                attn.q_proj.weight[_borrowed_rows(attn)] = 0
                if attn.q_proj.bias is not None:
                    attn.q_proj.bias[_borrowed_rows(attn)] = 0
            rows = torch.zeros(
                model.config.num_key_value_heads, model.config.hidden_size, device=model.device
            )
            attn.register_parameter(ROWS, nn.Parameter(rows))
    trained = {}
    for name, parameter in model.named_parameters():
        if train_all or "dms_" in name:
            trained[name] = parameter.requires_grad_(True)
    return trained


def start_from(
    path: Path, model: nn.Module, dms: DMSConfig, trained: dict[str, nn.Parameter]
) -> None:
    """The decisions of the adapter in `path` into the model's own."""
    adapter = read_adapter(path)
    check_against_base(adapter, model.config)
    for key, flag, mine in (
        ("dms_window_size", "--window", dms.window),
        ("dms_alpha_scale", "--alpha-scale", dms.alpha_scale),
    ):
        theirs = adapter.settings.get(key, mine)
        if theirs != mine:
            raise ValueError(
                f"{flag} is {mine:g}, but --init {path} was trained with {theirs:g}: give {flag} "
                f"{theirs:g}."
            )
    absent = sorted(set(adapter.tensors) ^ {name for name in trained if "dms_" in name})
    if absent:
        raise ValueError(
            f"--init {path} and --dialect differ in {len(absent)} tensors, first {absent[0]}: an "
            "adapter goes on as an adapter."
        )
    with torch.no_grad():
        for name, value in adapter.tensors.items():
            trained[name].copy_(value)


def save_adapter(
    model: nn.Module,
    dms: DMSConfig,
    tau: float,
    base: str,
    out: Path,
    dtype: torch.dtype,
    readme: str = "",
) -> None:
    """Writes `out`: what decides alone, over the model that `base` names."""
    state = model.state_dict()
    tensors = {name: state[name].to(dtype) for name in find_adapter_tensors(state)}
    config = model.config.to_dict()
    write_adapter(out, nvidia_keys(dms, tau), tensors, base, config, readme)


def save_merged(
    model: nn.Module, dms: DMSConfig, tau: float, source: Path, out: Path, dtype: torch.dtype
) -> None:
    """Writes `out`: weights in `dtype`, config.json with NVIDIA's keys, `source`'s tokenizer."""
    state = {name: tensor.detach().to(dtype) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        # Converted apart, the two are no longer seen to be one.
        state.pop("lm_head.weight", None)
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}.self_attn."
        rows = state.pop(prefix + ROWS, None)
        if rows is not None:
            state[prefix + "q_proj.weight"] = state[prefix + "q_proj.weight"].clone()
            state[prefix + "q_proj.weight"][_borrowed_rows(layer.self_attn)] = rows
    model.save_pretrained(out, state_dict=state)
    path = out / "config.json"
    config = json.loads(path.read_text())
    base = config["architectures"][0]
    config |= {
        "architectures": [base + "DMS" if dms.adapter else base],
        "dtype": str(dtype).removeprefix("torch."),
        **nvidia_keys(dms, tau),
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
