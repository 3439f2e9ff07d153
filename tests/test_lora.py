"""LoRA over a DMS model: a request with one is the model with that LoRA merged into its weights."""

import json

import pytest
import torch
from engines import NOISE, engine_args, prompts, sampling, worst_error
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

from vllm_dms.reference import ReferenceModel

RANK, ALPHA = 4, 8
# vLLM's LoRA kernels for a GPU take no fp32. Rounding to fp16 takes a log-probability off by up to
# 0.03 nats on a CPU, and decisions have to be clear of it.
DTYPE, NOISE, MARGIN = (
    (torch.float16, 0.1, 8.0) if torch.cuda.is_available() else (torch.float32, NOISE, 0.0)
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def modules(*names):
    return [
        f"model.layers.{layer}.{'mlp' if name in MLP else 'self_attn'}.{name}"
        for layer in range(2)
        for name in names
    ]


def write_lora(out, weights, names, seed=0):
    """PEFT's format; -> what it adds to each of the weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors, added = {}, {}
    for name in names:
        rows, columns = weights[f"{name}.weight"].shape
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b = 0.2 * torch.randn(rows, RANK, generator=generator)
        if name.endswith(("o_proj", "down_proj")):
            b[:5] = 0  # the channels that no layer writes to: see `checkpoints`
        a, b = a.to(DTYPE), b.to(DTYPE)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        added[f"{name}.weight"] = ALPHA / RANK * b.float() @ a.float()
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in names})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return added


def small(checkpoint, form):
    return checkpoint(form, evict_rate=0.5, min_margin=MARGIN, dtype=DTYPE)


def engine(make_engine, path, **kwargs):
    # vLLM on a CPU gives tokens without a LoRA the last slot's, DMS or not: here it stays empty.
    lora = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    args = {"dtype": str(DTYPE).removeprefix("torch."), "gpu_memory_utilization": 0.2}
    return make_engine(path, **engine_args(32, **lora, **args, **kwargs))


def ask(llm, requests, max_tokens=30):
    """-> an output for each (prompt, LoRA or None), all at once"""
    prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
    loras = [lora for _, lora in requests]
    return llm.generate(prompts, sampling(max_tokens), lora_request=loras, use_tqdm=False)


def with_and_without(path, lora_dir, targets):
    """-> the model, the same with a new LoRA merged into it"""
    reference = ReferenceModel.from_dir(path)
    added = write_lora(lora_dir, reference.weights, modules(*targets))
    weights = {n: w + added.get(n, 0.0) for n, w in reference.weights.items()}
    config = json.loads((path / "config.json").read_text())
    return reference, ReferenceModel(config, weights, reference.dms)


FORMS = {"nvidia-adapter": (*ATTENTION, *MLP), "nvidia-borrowed": (*ATTENTION[1:], *MLP)}


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", FORMS)
def test_a_request_with_lora_is_the_merged_model_beside_those_without(
    checkpoint, make_engine, tmp_path, form, eager
):
    path = small(checkpoint, form)
    reference, merged = with_and_without(path, tmp_path / "lora", FORMS[form])
    loras = [None, LoRARequest("tuned", 1, str(tmp_path / "lora"))] * 2
    requests = list(zip(prompts((20, 97, 230, 700)), loras, strict=True))
    outputs = ask(engine(make_engine, path, enforce_eager=eager), requests)
    for (ids, lora), output in zip(requests, outputs, strict=True):
        right, wrong = (merged, reference) if lora else (reference, merged)
        assert worst_error(right, ids, output) < NOISE
        assert worst_error(wrong, ids, output) > 30 * NOISE
    assert outputs[-1].kv_transfer_params["dms"]["compression"] > 1.5


@pytest.mark.parametrize("length", [12, 230], ids=["less than a block", "blocks"])
def test_a_kept_state_is_found_with_its_lora_only(checkpoint, make_engine, tmp_path, length):
    path = small(checkpoint, "nvidia-adapter")
    reference, merged = with_and_without(path, tmp_path / "lora", ATTENTION)
    lora = LoRARequest(f"tuned {length}", length, str(tmp_path / "lora"))
    llm = engine(make_engine, path, additional_config={"dms": {"prefix_cache": True}})
    (ids,) = prompts((length,), seed=5)
    asked = [(0, lora, merged, 0), (1, None, reference, 0), (1, lora, merged, length)]
    for more, using, model, cached in (*asked, (2, None, reference, length + 1)):
        prompt = [*ids, 7, 8][: len(ids) + more]
        (output,) = ask(llm, [(prompt, using)])
        assert output.num_cached_tokens == cached
        assert worst_error(model, prompt, output) < NOISE


@pytest.mark.parametrize(
    ("form", "target", "named"),
    [
        ("nvidia-borrowed", "q_proj", "no LoRA on q_proj.*received.*layers.0.self_attn.q_proj"),
        ("nvidia-adapter", "dms_proj_alpha", "received.*layers.0.self_attn.dms_proj_alpha"),
    ],
)
def test_what_decides_takes_no_lora(checkpoint, make_engine, tmp_path, form, target, named):
    path = small(checkpoint, form)
    weights = ReferenceModel.from_dir(path).weights
    write_lora(tmp_path / "lora", weights, modules(target, "v_proj"))
    llm = engine(make_engine, path)
    with pytest.raises(ValueError, match=named):
        llm.llm_engine.add_lora(LoRARequest("deciding", 2, str(tmp_path / "lora")))
