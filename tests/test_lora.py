"""LoRA over a DMS model: two share a batch, each is the model it is merged into, decisions too."""

import json

import pytest
import torch
from engines import NOISE, engine_args, prompts, sampling, worst_error
from safetensors.torch import load_file, save_file

from vllm_dms.reference import ReferenceModel

RANK, SCALE = 8, 2.0
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OTHERS = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def write_lora(path, out, modules, seed=5):
    """A random LoRA in PEFT's format -> the weights of the model that it is merged into."""
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in [n for n in weights if n.removesuffix(".weight").endswith(modules)]:
        rows, columns = weights[name].shape
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, RANK, generator=generator) * 0.1
        weights[name] = weights[name] + SCALE * b @ a
        stem = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK * SCALE,
        "target_modules": [module.rpartition(".")[-1] for module in modules],
        "bias": "none",
    }
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    return weights


def request(name, index, path):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, index, str(path))


def lora_engine(make_engine, path, **kwargs):
    return make_engine(
        path, **engine_args(96, enable_lora=True, max_loras=2, max_lora_rank=RANK, **kwargs)
    )


@pytest.mark.parametrize(
    ("form", "modules"),
    [("nvidia-adapter", ATTENTION + OTHERS), ("nvidia-borrowed", OTHERS)],
)
def test_a_lora_served_is_the_lora_merged(checkpoint, make_engine, tmp_path, form, modules):
    path = checkpoint(form, evict_rate=0.5)
    targets = sorted(module.rpartition(".")[-1] for module in modules)
    restricted = {} if form == "nvidia-adapter" else {"lora_target_modules": targets}
    llm = lora_engine(make_engine, path, **restricted)
    plain = ReferenceModel.from_dir(path)
    config = json.loads((path / "config.json").read_text())
    references, loras = [], []
    for i in (0, 1):
        merged = write_lora(path, tmp_path / f"{i}", modules, seed=5 + i)
        references.append(ReferenceModel(config, merged, plain.dms))
        loras.append(request(f"{i}", 1 + i, tmp_path / f"{i}"))
    token_ids = [ids for ids in prompts((97, 230, 512)) for _ in loras]

    def ask(token_ids, loras):
        asked = [{"prompt_token_ids": ids} for ids in token_ids]
        return llm.generate(asked, sampling(40), lora_request=loras, use_tqdm=False)

    outputs = ask(token_ids, loras * 3)
    for i, (prompt, output) in enumerate(zip(token_ids, outputs, strict=True)):
        assert worst_error(references[i % 2], prompt, output) < NOISE
        assert worst_error(references[1 - i % 2], prompt, output) > 100 * NOISE
    live = [output.kv_transfer_params["dms"]["live_tokens"] for output in outputs]
    assert live[4] != live[5], "a LoRA changes what is evicted"
    # In a batch of their own: vLLM for CPU gives requests without a LoRA the last one of the batch.
    for prompt, output in zip(token_ids[::2], ask(token_ids[::2], None), strict=True):
        assert worst_error(plain, prompt, output) < NOISE


def test_a_lora_on_the_decision_itself_is_refused(checkpoint, make_engine, tmp_path):
    path = checkpoint("nvidia-adapter", evict_rate=0.5)
    write_lora(path, tmp_path / "lora", ("self_attn.dms_proj_alpha",))
    llm = lora_engine(make_engine, path)
    with pytest.raises(ValueError, match="dms_proj_alpha"):
        llm.llm_engine.add_lora(request("deciding", 3, tmp_path / "lora"))
