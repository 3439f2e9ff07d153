"""FastDMS with its compact cache in FP8. Of flash_attn, which it imports two functions of, vLLM's
FlashAttention 3 stands in where flash_attn is not installed."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from load import Load, run, timed


@contextmanager
def flash_attn() -> Iterator[str]:
    """While FastDMS is imported. Says which FlashAttention it is."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield "flash_attn"
        return
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def varlen(q: Any, k: Any, v: Any, **kwargs: Any) -> torch.Tensor:
        return flash_attn_varlen_func(q, k, v, fa_version=3, **kwargs)

    def with_kvcache(q, k_cache, v_cache, cache_seqlens, block_table, **kwargs) -> torch.Tensor:
        """q [B, 1, Hq, D]: a token of each sequence"""
        ends = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
        longest = block_table.shape[1] * k_cache.shape[1]
        out = varlen(
            q.flatten(0, 1), k_cache, v_cache, max_seqlen_q=1, cu_seqlens_q=ends,
            max_seqlen_k=longest, seqused_k=cache_seqlens, block_table=block_table, **kwargs,
        )  # fmt: skip
        return out.unsqueeze(1)

    module = type(sys)("flash_attn")
    module.flash_attn_varlen_func, module.flash_attn_with_kvcache = varlen, with_kvcache
    module.__spec__ = ModuleSpec("flash_attn", None)  # transformers asks for it
    sys.modules["flash_attn"] = module
    yield "vLLM's FlashAttention 3"
    del sys.modules["flash_attn"]


def measure(load: Load) -> dict[str, Any]:
    with flash_attn() as attention:
        from fastdms import LLM, SamplingParams

    engine = LLM(
        f"{load.model}/dms",
        enforce_eager=True,  # of the dense cache; the compact one decodes by CUDA graphs
        compact_kv_enabled=True,
        compact_kv_retention_mode="dms",
        # Of every layer in one tensor. In 0.2.0 the other layout fails in the first decode step:
        # positions of 64 bits are put into a tensor of 32.
        compact_kv_layer_major_metadata=True,
        kv_cache_dtype="float8_e4m3fn",
        max_num_seqs=load.batch,
        max_model_len=load.prompt + load.tokens,
    )
    print("the engine is ready", flush=True)
    prompts = load.prompts(engine.model_runner.config.hf_config.vocab_size)

    def generate(tokens: int) -> None:
        params = SamplingParams(temperature=1.0, max_tokens=tokens, ignore_eos=True)
        engine.generate(prompts, params, use_tqdm=False)

    # As long as the one that is timed: the room for what is generated is part of the cache's size,
    # and a cache that grows has its graph captured again.
    return {"seconds": timed(generate, load.tokens, load.tokens), "flash_attn": attention}


if __name__ == "__main__":
    run("fastdms", measure)
