"""The embedded checkpoint does what its README says: through vLLM on a CPU, at 4,096 tokens."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from engines import NOISE, generate, worst_error

import vllm_dms
from examples.tiny.needles import make_prompts
from vllm_dms import verify
from vllm_dms.config import DMSConfig
from vllm_dms.reference import ReferenceModel

TINY = Path(vllm_dms.__file__).parent / "assets" / "tiny"
LENGTH = 4096
MEGABYTES = 12


def engine_args(dtype="float32", **kwargs):
    return {
        "dtype": dtype,
        "kv_cache_dtype": "dms",
        "max_model_len": 4352,
        "max_num_batched_tokens": 1024,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": 128 << 20,
        "logprobs_mode": "raw_logprobs",
        **kwargs,
    }


def answer(llm, prompts, **kwargs):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=64, **kwargs)
    return llm.generate([p.text for p in prompts], params, use_tqdm=False)


def share_answered(prompts, outputs):
    right = [
        a in o.outputs[0].text for p, o in zip(prompts, outputs, strict=True) for a in p.answers
    ]
    return sum(right) / len(right)


def test_files_are_those_of_the_readme():
    weights = (TINY / "model.safetensors").read_bytes()
    assert len(weights) <= MEGABYTES << 20
    assert hashlib.sha256(weights).hexdigest() in (TINY / "README.md").read_text()
    config = json.loads((TINY / "config.json").read_text())
    rule = DMSConfig.from_checkpoint(config)
    assert (rule.dialect, rule.window, rule.nominal_ratio, rule.shift) == (
        "nvidia-adapter",
        64,
        8,
        1,
    )
    assert config["max_position_embeddings"] >= 2 * LENGTH


def test_the_tokenizer_knows_the_corpus_and_spells_the_rest():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    prompt = make_prompts(seed=1, length=512, n=1)[0]
    messages = [{"role": "user", "content": prompt.user}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == prompt.text
    for text in (prompt.text, "Zażółć gęślą jaźń! 12345 {}"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_needles_are_answered_and_six_of_seven_keys_are_gone(make_engine):
    prompts = make_prompts(seed=11, length=LENGTH, n=4, asked=3)
    outputs = answer(make_engine(TINY, **engine_args()), prompts)
    assert share_answered(prompts, outputs) >= 11 / 12
    for output in outputs:
        stats = output.kv_transfer_params["dms"]
        assert stats["dense_tokens"] > 0.97 * LENGTH
        assert stats["compression"] >= 6


def test_needles_are_recalled_in_the_middle_of_generation(make_engine):
    prompts = make_prompts(seed=12, length=2048, n=2, asked=2, kind="report")
    outputs = answer(make_engine(TINY, **engine_args()), prompts)
    assert share_answered(prompts, outputs) >= 3 / 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probabilities_are_the_references(make_engine, dtype):
    """bfloat16 may err twice as much as the reference in bfloat16, on average, and by the rounding
    of a log-probability near 10: a decision on the threshold can fall either way in it."""
    from vllm import SamplingParams

    llm = make_engine(TINY, **engine_args(dtype))
    token_ids = [llm.get_tokenizer()(p.text).input_ids for p in make_prompts(13, 1500, 2, asked=2)]
    params = SamplingParams(
        temperature=0, max_tokens=48, ignore_eos=True, logprobs=3, detokenize=False
    )
    exact = ReferenceModel.from_dir(TINY)
    rough = ReferenceModel.from_dir(TINY, dtype=torch.bfloat16)
    for prompt, output in zip(token_ids, generate(llm, token_ids, params), strict=True):
        if dtype == "float32":
            assert worst_error(exact, prompt, output) < NOISE
            continue
        ids = prompt + list(output.outputs[0].token_ids)
        truth, rounded = (m.forward(ids).logits.log_softmax(-1) for m in (exact, rough))
        mine, reference = [], []
        for step, entries in enumerate(output.outputs[0].logprobs):
            row = len(prompt) - 1 + step
            for token, entry in entries.items():
                mine.append(abs(truth[row, token].item() - entry.logprob))
                reference.append(abs(truth[row, token] - rounded[row, token]).item())
        assert sum(mine) <= 2 * sum(reference) + len(mine) * 10 * 2**-9


def test_verify_accepts_it(capsys):
    assert verify.main([str(TINY), "--length", "2048"]) == 0
    out = capsys.readouterr().out
    assert "nvidia-adapter" in out and out.endswith("OK\n")
