"""Through vLLM's engine: log-probabilities equal the reference model's, whatever the batching."""

import random

import pytest
import torch
from checkpoints import random_tokens

from vllm_dms.reference import ReferenceModel, live_counts

NOISE = 1e-3  # nats; fp32 rounding is about 3e-5, the mildest wrong rule about 3e-2
LENGTHS = (20, 97, 230, 512, 700, 1200)
GENERATED = 70

DIALECTS = {
    "borrowed": {"dialect": "nvidia-borrowed"},
    "adapter": {"dialect": "nvidia-adapter"},
    "per-layer": {"dialect": "nvidia-borrowed", "alpha_per": "layer"},
    "adapter-per-layer": {"dialect": "nvidia-adapter", "alpha_per": "layer"},
    "fastdms": {"dialect": "fastdms"},
    "llama-adapter": {"dialect": "nvidia-adapter", "arch": "LlamaForCausalLM"},
    "disabled": {"dialect": "nvidia-borrowed", "disable_eviction": True},
}


def engine_args(chunk, **kwargs):
    return {
        "dtype": "float32",
        "kv_cache_dtype": "dms",
        "max_model_len": 2048,
        "max_num_batched_tokens": chunk,
        "max_num_seqs": 8,
        "block_size": 16,
        "kv_cache_memory_bytes": 32 << 20,
        "logprobs_mode": "raw_logprobs",
        **kwargs,
    }


def sampling(max_tokens=GENERATED):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=3, detokenize=False
    )


def prompts(lengths=LENGTHS, seed=0):
    return [random_tokens(n, seed=seed + i) for i, n in enumerate(lengths)]


def generate(llm, token_ids, params):
    return llm.generate([{"prompt_token_ids": ids} for ids in token_ids], params, use_tqdm=False)


def worst_error(reference: ReferenceModel, prompt, output) -> float:
    """Largest difference of any returned log-probability from the reference's."""
    ids = list(output.outputs[0].token_ids)
    logits = reference.forward(prompt + ids).logits.log_softmax(-1)
    worst = 0.0
    for step, entries in enumerate(output.outputs[0].logprobs):
        row = logits[len(prompt) - 1 + step]
        worst = max(worst, *(abs(row[t].item() - lp.logprob) for t, lp in entries.items()))
    return worst


@pytest.mark.parametrize("chunk", [32, 96, 512])
@pytest.mark.parametrize("name", DIALECTS)
def test_log_probabilities_are_the_references(checkpoint, make_engine, name, chunk):
    if chunk != 96 and name not in ("borrowed", "adapter", "fastdms", "per-layer"):
        pytest.skip("one chunk size is enough for the variants")
    path = checkpoint(**DIALECTS[name])
    llm = make_engine(path, **engine_args(chunk))
    reference = ReferenceModel.from_dir(path)
    token_ids = prompts()
    outputs = generate(llm, token_ids, sampling())
    for prompt, output in zip(token_ids, outputs, strict=True):
        assert worst_error(reference, prompt, output) < NOISE


def test_live_counts_reach_the_client(checkpoint, make_engine):
    path = checkpoint(**DIALECTS["borrowed"])
    reference = ReferenceModel.from_dir(path)
    token_ids = prompts()
    outputs = generate(make_engine(path, **engine_args(96)), token_ids, sampling())
    for prompt, output in zip(token_ids, outputs, strict=True):
        # The last sampled token is never fed back.
        ids = prompt + list(output.outputs[0].token_ids)[:-1]
        live = live_counts(reference.forward(ids).evict, reference.dms.window)
        stats = output.kv_transfer_params["dms"]
        assert stats["dense_tokens"] == len(ids)
        assert stats["live_tokens"] == pytest.approx(live.float().mean().item())
