"""The model families that DMS is built into: the one table that everything else reads.

Pure data, importable without torch or vLLM. A row is enough to serve a family whose vLLM class is
built like Llama: `model.layers[i]` with `input_layernorm` and a `self_attn` that has `qkv_proj`,
`rotary_emb`, `attn` and `o_proj`, called with positions and hidden states (`graft`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

NVIDIA_SUFFIX = "DMS"  # NVIDIA's classes are named after the dense ones, with this in the name


@dataclass(frozen=True)
class Family:
    name: str  # for people
    model_type: str  # in config.json
    architecture: str  # in config.json, and of the class in transformers and vLLM
    module: str  # where vLLM has that class
    qk_norm: bool = False  # queries and keys are normed per head, before RoPE
    # Whether q_proj, k_proj and v_proj have biases: as config.json says, or always.
    qkv_bias: Literal["attention_bias", "always"] = "attention_bias"
    moe: bool = False  # mlp is a router and experts

    @property
    def dms_architecture(self) -> str:
        """The class that `vllm_dms.models` makes of vLLM's."""
        return NVIDIA_SUFFIX + self.architecture

    @property
    def nvidia_architecture(self) -> str:
        """What Model-Optimizer calls its class of the adapter form."""
        return self.architecture + NVIDIA_SUFFIX


_VLLM = "vllm.model_executor.models."
FAMILIES = (
    Family("Qwen3", "qwen3", "Qwen3ForCausalLM", _VLLM + "qwen3", qk_norm=True),
    Family(
        "Qwen3-MoE", "qwen3_moe", "Qwen3MoeForCausalLM", _VLLM + "qwen3_moe", qk_norm=True, moe=True
    ),
    Family("Qwen2", "qwen2", "Qwen2ForCausalLM", _VLLM + "qwen2", qkv_bias="always"),
    Family("Llama", "llama", "LlamaForCausalLM", _VLLM + "llama"),
    Family("Mistral", "mistral", "MistralForCausalLM", _VLLM + "mistral"),
)
_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}
_BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}
# What transformers calls a model without its head, and vLLM a checkpoint that doesn't say.
_BACKBONES = {family.architecture.replace("ForCausalLM", "Model") for family in FAMILIES}


def family_of_architectures(names: Iterable[str]) -> Family | None:
    """The family of config.json's `architectures`, also under NVIDIA's and this plugin's names."""
    known = (_BY_ARCHITECTURE.get(name.replace(NVIDIA_SUFFIX, "")) for name in names)
    return next((family for family in known if family is not None), None)


def family_of(config: Mapping) -> Family | None:
    """The same of config.json itself: by `model_type`, if `architectures` is missing or says no
    more than that (Model-Optimizer removes it from what it exports)."""
    names = config.get("architectures") or []
    if all(name.replace(NVIDIA_SUFFIX, "") in _BACKBONES for name in names):
        return _BY_MODEL_TYPE.get(config.get("model_type", ""))
    return family_of_architectures(names)
