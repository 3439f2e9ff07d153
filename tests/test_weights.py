"""The checkpoint's tensors: what is missing, left over, dropped by vLLM or rounded is said."""

from types import SimpleNamespace

import pytest
import torch
from checkpoints import make_checkpoint
from engines import check_exact, engine_args, generate, prompts, sampling
from quantized import quantize_int8
from safetensors.torch import load_file, save_file
from torch import nn

from vllm_dms.models import decision


@pytest.fixture
def edited(tmp_path):
    """edited(change, dialect, **make_checkpoint's arguments): change(weights) edits them."""

    def make(change, dialect="nvidia-borrowed", **kwargs):
        path = make_checkpoint(tmp_path / "edited", dialect, **kwargs)
        weights = load_file(path / "model.safetensors")
        change(weights)
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        return path

    return make


ALPHA = "model.layers.1.self_attn.dms_proj_alpha"
BIASED = {"extra_config": {"attention_bias": True}}


@pytest.mark.parametrize(
    ("dialect", "kwargs", "change", "named"),
    [
        ("nvidia-adapter", {}, lambda w: w.pop(f"{ALPHA}.weight"), "lacks 1 of 6"),
        ("nvidia-adapter", {}, lambda w: w.pop(f"{ALPHA}_norm.weight"), "lacks 1 of 6"),
        ("nvidia-adapter", BIASED, lambda w: w.pop(f"{ALPHA}.bias"), f"lacks 1 of 6.*{ALPHA}.bias"),
        (
            "nvidia-borrowed",
            {},
            lambda w: w.update({f"{ALPHA}.weight": torch.ones(2, 128)}),
            "dms_separate",
        ),
    ],
    ids=["no projection", "no norm", "no bias", "left over"],
)
def test_adapter_weights_must_match_the_config(edited, make_engine, dialect, kwargs, change, named):
    with pytest.raises(ValueError, match=named):
        make_engine(edited(change, dialect, **kwargs), **engine_args(96))


def test_an_adapter_may_have_a_bias_of_its_own(edited, make_engine):
    def change(weights):
        for i in range(2):
            weights[f"model.layers.{i}.self_attn.dms_proj_alpha.bias"] = torch.tensor([0.05, -0.1])

    path = edited(change, "nvidia-adapter")
    check_exact(path, make_engine(path, **engine_args(96)), prompts((230, 97)), sampling(20))


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("Qwen3ForCausalLM", "self_attn.o_proj"),
        ("Qwen3ForCausalLM", "mlp.gate_proj"),
        ("Qwen2ForCausalLM", "self_attn.o_proj"),
        ("LlamaForCausalLM", "mlp.down_proj"),
        ("Qwen3MoeForCausalLM", "mlp.experts.1.up_proj"),
    ],
)
def test_a_bias_that_vllm_would_drop_is_refused(edited, make_engine, expert_group, arch, name):
    full = f"model.layers.1.{name}.bias"

    def change(weights):
        weights[full] = torch.zeros(128)
        weights[full][3] = 0.5

    path = edited(change, arch=arch, extra_config={"attention_bias": arch == "Qwen3ForCausalLM"})
    with pytest.raises(ValueError, match=f"{full}, which is not zero"):
        make_engine(path, **engine_args(96))


def test_a_bias_of_zeros_is_nothing(edited, make_engine):
    """GPTQ writes them."""
    path = edited(lambda w: w.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(128)}))
    check_exact(path, make_engine(path, **engine_args(96)), prompts((230,)), sampling(4))


@pytest.fixture
def int8_in_fp32(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("on a GPU vLLM has int8 for models in 16 bits only")
    # So it is on a CPU with AMX, by the kernel that vLLM prefers there.
    kernels = "vllm.model_executor.kernels.linear.scaled_mm.cpu"
    monkeypatch.setattr(f"{kernels}.check_cpu_sgl_kernel", lambda *_: False)


@pytest.fixture
def rounding_warnings(monkeypatch):
    found = []
    monkeypatch.setattr(
        decision.logger, "warning_once", lambda text, *args: found.append(text % args)
    )
    return found


def decisions(llm, prompt):
    """The engine's own, of a prompt in one step, by layer and head."""
    found, read = [], decision.BorrowedChannel.read

    def reading(source, stream, query):
        alpha, query = read(source, stream, query)
        found.append(alpha * 100 - 5 > 0)
        return alpha, query

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decision.BorrowedChannel, "read", reading)
        generate(llm, [prompt], sampling(1))
    return torch.stack(found[:2])


def test_few_decisions_differ_in_int8_and_a_warning_says_so(
    int8_in_fp32, checkpoint, make_engine, tmp_path, rounding_warnings
):
    path = checkpoint("nvidia-borrowed")
    (prompt,) = prompts((500,))
    right = decisions(make_engine(path, **engine_args(512)), prompt)
    assert not rounding_warnings
    kept = quantize_int8(path, tmp_path / "kept", keep=("q_proj", "k_proj", "v_proj"))
    few = (decisions(make_engine(kept, **engine_args(512)), prompt) != right).float().mean()
    assert not rounding_warnings
    all_int8 = quantize_int8(path, tmp_path / "int8")
    more = (decisions(make_engine(all_int8, **engine_args(512)), prompt) != right).float().mean()
    assert 0 < few < more < 0.03
    assert "q_proj is quantized" in rounding_warnings[0] and "adapter form" in rounding_warnings[0]


@pytest.mark.parametrize("form", ["nvidia-adapter", "fastdms"])
def test_only_what_is_borrowed_is_warned_about(
    int8_in_fp32, checkpoint, make_engine, tmp_path, rounding_warnings, form
):
    make_engine(quantize_int8(checkpoint(form), tmp_path / form), **engine_args(512))
    assert bool(rounding_warnings) == (form == "fastdms")


class Packed(nn.Module):
    """A stack of 96 rows of 64 weights, as 4-bit methods pack them."""

    def __init__(self, dtype, *shape, method="AutoGPTQLinearMethod"):
        super().__init__()
        self.qweight = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
        self.scales = nn.Parameter(torch.zeros(96, 4))
        self.input_size, self.output_size_per_partition = 64, 96
        self.quant_method = type(method, (SimpleNamespace,), {})()


@pytest.mark.parametrize(
    "packed",
    [
        Packed(torch.int32, 64 // 8, 96),
        Packed(torch.int32, 64, 96 // 8),
        Packed(torch.uint8, 64 * 96 // 2, 1),
        Packed(torch.bfloat16, 96, 64, method="Mxfp4OnlineLinearMethod"),
        Packed(torch.bfloat16, 96, 64, method="TorchAOLinearMethod"),
    ],
    ids=["GPTQ", "AWQ", "bitsandbytes", "MXFP4 on loading", "torchao"],
)
def test_a_decision_in_4_bits_is_refused(packed):
    with pytest.raises(ValueError, match=r"less than 8 bits \(.*q_proj, k_proj and v_proj"):
        decision.check_rounding(packed)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bfloat16])
def test_a_decision_in_8_bits_is_warned_about(dtype, rounding_warnings):
    decision.check_rounding(Packed(dtype, 96, 64, method="Fp8LinearMethod"))
    assert "Fp8LinearMethod" in rounding_warnings[0]
