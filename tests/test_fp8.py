"""FP8 storage: half the bytes, and closer to the unquantized cache than vLLM's own FP8 cache."""

import pytest
import torch
from engines import engine_args, generate, prompts

from vllm_dms.backend.runtime import get_runtime

LENGTH = 300


def distributions(llm, token_ids):
    """log-probabilities [prompts * (T - 1), vocab] of every prompt position."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    rows = []
    for output in generate(llm, token_ids, params):
        for entries in output.prompt_logprobs[1:]:
            rows.append(torch.tensor([entries[t].logprob for t in sorted(entries)]))
    return torch.stack(rows)


def mean_kl(p, q):
    return (p.exp() * (p - q)).sum(-1).mean().item()


def score(checkpoint, make_engine, cache_dtype, **kwargs):
    # Short chunks, so that most keys are read from the cache.
    args = engine_args(48, kv_cache_dtype=cache_dtype, dtype="bfloat16", max_logprobs=-1, **kwargs)
    llm = make_engine(checkpoint, **args)
    return distributions(llm, prompts((LENGTH,), seed=9))


def test_fp8_pages_are_half_as_large_and_stay_close(checkpoint, make_engine):
    path = checkpoint("nvidia-borrowed", min_margin=5.0)
    exact = score(path, make_engine, "dms")
    fp8 = score(path, make_engine, "dms_fp8")
    assert 0 < mean_kl(exact, fp8) < 0.05
    sizes = [
        get_runtime(
            make_engine(
                path, **engine_args(48, kv_cache_dtype=t, dtype="bfloat16", max_logprobs=-1)
            ).llm_engine.vllm_config
        ).layout.page_bytes
        for t in ("dms", "dms_fp8")
    ]
    # Two scales of two bytes beside 2 x 32 values.
    assert sizes[1] / sizes[0] == (2 * 32 + 4) / (2 * 32 * 2)


@pytest.mark.gpu
def test_fp8_is_not_worse_than_vllms(checkpoint, make_engine, fresh_connector):
    """Same weights, nothing evicted, each against its own bfloat16 cache."""
    path = checkpoint("nvidia-borrowed", head_dim=128, min_margin=5.0)
    common = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 128 << 20}
    stock = [score(path, make_engine, t, **common) for t in ("auto", "fp8")]
    control = {"additional_config": {"dms": {"evict": False}}}
    ours = [score(path, make_engine, t, **common, **control) for t in ("dms", "dms_fp8")]
    kl_stock, kl_ours = mean_kl(*stock), mean_kl(*ours)
    print(f"mean KL of FP8 against bfloat16: vLLM {kl_stock:.2e}, dms_fp8 {kl_ours:.2e}")
    assert 0 < kl_ours <= kl_stock
