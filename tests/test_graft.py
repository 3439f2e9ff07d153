"""vLLM's models with their attention replaced: what stays, what changes, what is refused."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from engines import engine_args
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

import vllm_dms.models
from vllm_dms.backend.attention import DMSAttention
from vllm_dms.backend.projection import Projection
from vllm_dms.models.families import FAMILIES, family_of_architectures
from vllm_dms.models.graft import refuse_special_attention


def names(family):
    return family.architecture


@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_each_family_has_a_class_that_is_vllms_own(family):
    cls = getattr(vllm_dms.models, family.dms_architecture)
    assert cls.__name__ == family.dms_architecture
    assert [base.__name__ for base in cls.__mro__].count(family.architecture) == 1
    assert getattr(vllm_dms.models, family.dms_architecture) is cls


@pytest.mark.parametrize("family", FAMILIES, ids=names)
def test_a_family_is_found_by_each_of_its_names(family):
    for name in (family.architecture, family.nvidia_architecture, family.dms_architecture):
        assert family_of_architectures(["Other", name]) is family
    assert family_of_architectures(["Qwen3ForSequenceClassification"]) is None


def test_other_names_are_no_models():
    with pytest.raises(AttributeError, match="DMSGemmaForCausalLM"):
        _ = vllm_dms.models.DMSGemmaForCausalLM


def test_the_table_of_families_needs_neither_torch_nor_vllm():
    code = "import sys, vllm_dms.config; assert not {'torch', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dialect", ["nvidia-borrowed", "nvidia-adapter"])
def test_only_attention_is_replaced_and_under_the_old_names(checkpoint, make_engine, dialect):
    llm = make_engine(checkpoint(dialect), **engine_args(96))
    config = llm.llm_engine.engine_core.engine_core.vllm_config
    layers = config.compilation_config.static_forward_context
    assert list(layers) == [f"model.layers.{i}.self_attn.attn" for i in range(2)]
    assert [layer.layer_index for layer in layers.values()] == [0, 1]

    def look(model: nn.Module):
        for layer in model.model.layers:
            assert type(layer).__module__ == "vllm.model_executor.models.qwen3"
            assert type(layer.mlp).__module__.startswith("vllm.")
            assert layer.self_attn.attn is layers[layer.self_attn.attn.layer_name]
        return {name for name, _ in model.named_parameters() if "dms_" in name}

    suffixes = ("proj_alpha.weight", "proj_alpha.bias", "proj_alpha_norm.weight")
    expected = {f"model.layers.{i}.self_attn.dms_{s}" for i in range(2) for s in suffixes}
    assert llm.apply_model(look) == [expected if dialect == "nvidia-adapter" else set()]


def plain_attention(**changes):
    attn = Attention.__new__(changes.pop("cls", Attention))
    nn.Module.__init__(attn)
    attn.layer_name, attn.attn_type = "model.layers.0.self_attn.attn", AttentionType.DECODER
    attn.sliding_window = attn.kv_sharing_target_layer_name = None
    attn.has_sink = False
    attn.impl = SimpleNamespace(logits_soft_cap=0, alibi_slopes=None)
    outer = {name: changes.pop(name) for name in OUTER & changes.keys()}
    for name, value in changes.items():
        setattr(attn, name, value)
    return SimpleNamespace(attn=attn, **outer)


OUTER = {"dual_chunk_attention_config", "do_llama_4_scaling"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attn_type": AttentionType.ENCODER_ONLY}, "is_causal"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ({"sliding_window": 64}, "sliding-window"),
        ({"has_sink": True}, "sinks"),
        ({"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"}, "shared between"),
        ({"impl": SimpleNamespace(logits_soft_cap=30.0, alibi_slopes=None)}, "soft cap"),
        ({"impl": SimpleNamespace(logits_soft_cap=0, alibi_slopes=[0.5])}, "ALiBi"),
        ({"do_llama_4_scaling": True}, "llama_4_scaling"),
        ({"cls": DMSAttention}, "class DMSAttention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_that_is_more_than_plain_is_refused(changes, words):
    refuse_special_attention(plain_attention())
    with pytest.raises(ValueError, match=rf"{words}.*layers\.0.*--kv-cache-dtype auto"):
        refuse_special_attention(plain_attention(**changes))


def test_layers_that_norm_by_another_epsilon_than_the_first_are_refused():
    first, other = (Projection(None, None, eps, None) for eps in (1e-6, 1e-5))
    layer = SimpleNamespace(layer_name="x", dms_runtime=SimpleNamespace(projection=first))
    DMSAttention.set_projection(layer, first)
    with pytest.raises(ValueError, match="epsilon of 1e-05 and the first layer with 1e-06"):
        DMSAttention.set_projection(layer, other)
