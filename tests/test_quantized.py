"""Quantized bases: decisions come from unquantized weights, and DMS adds no error of its own.

Stock vLLM over the same weights is the measure: how far it is from the reference of the values that
the quantized weights stand for, without eviction, DMS is with eviction, up to luck.
"""

import pytest
import torch
from engines import engine_args, generate, prompts, sampling, worst_error
from quantized import quantize_awq, quantize_fp8, quantize_gptq, quantize_modelopt

from vllm_dms.reference import ReferenceModel, live_counts

LUCK = 2.0
# Nats that stock vLLM may be off: of bf16 alone, and of FP8 in activations or in both. Weights
# that are not what the reference has are off by 5.
ROUNDING = {"bf16": 0.3, "fp8": 1.5}
METHODS = [
    pytest.param(quantize_gptq, "bf16", id="GPTQ"),
    pytest.param(quantize_awq, "bf16", id="AWQ"),
    pytest.param(quantize_fp8, "fp8", id="FP8", marks=pytest.mark.gpu),
    pytest.param(quantize_modelopt, "fp8", id="modelopt", marks=pytest.mark.gpu),
]
TOKENS = 24


def errors(reference, llm, token_ids):
    outputs = generate(llm, token_ids, sampling(TOKENS))
    return [worst_error(reference, *pair) for pair in zip(token_ids, outputs, strict=True)], outputs


def multiplies_4_bits():
    """Whether vLLM has a kernel for it here: on a CPU its AVX2 build has none."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return torch.cuda.is_available() or hasattr(torch.ops._C, "cpu_gemm_wna16")


def bf16(chunk=96, **kwargs):
    return engine_args(chunk, dtype="bfloat16", gpu_memory_utilization=0.2, **kwargs)


def check_no_further_than_stock(make_engine, monkeypatch, path, values, token_ids, most, **flags):
    from vllm.distributed.kv_transfer import kv_transfer_state

    dense = ReferenceModel.from_dir(values, {"evict": False})
    reference = ReferenceModel.from_dir(values)
    stock = make_engine(path, **bf16(kv_cache_dtype="auto", **flags) | {"block_size": 128})
    stocks, _ = errors(dense, stock, token_ids)
    # Of one process, engines without a connector can't follow one with it: the other way around.
    monkeypatch.setattr(kv_transfer_state, "_KV_CONNECTOR_AGENT", None)
    found, outputs = errors(reference, make_engine(path, **bf16(**flags)), token_ids)
    assert max(stocks) < most, "the weights are not what the reference has"
    assert max(found) < LUCK * max(stocks)
    for prompt, output in zip(token_ids, outputs, strict=True):
        stored = prompt + list(output.outputs[0].token_ids)[:-1]
        forward = reference.forward(stored)
        live = live_counts(forward.evict, reference.dms.window).float().mean().item()
        assert output.kv_transfer_params["dms"]["live_tokens"] == pytest.approx(live, rel=0.02)
        assert live < 0.6 * len(stored)


@pytest.mark.parametrize(("quantize", "activations"), METHODS)
def test_a_quantized_base_is_no_further_from_its_reference_than_in_stock_vllm(
    checkpoint, make_engine, fresh_connector, monkeypatch, tmp_path, quantize, activations
):
    if activations == "bf16" and not multiplies_4_bits():
        pytest.skip("vLLM's kernel for 4 bits on a CPU needs AVX-512")
    path = checkpoint("nvidia-adapter", evict_rate=0.7, min_margin=8.0, dtype=torch.bfloat16)
    quantized, values = quantize(path, tmp_path)
    token_ids = prompts((97, 230, 512))
    stock_error = ROUNDING[activations]
    check_no_further_than_stock(make_engine, monkeypatch, quantized, values, token_ids, stock_error)


@pytest.mark.gpu
def test_so_is_one_that_is_rounded_when_it_is_loaded(
    checkpoint, make_engine, fresh_connector, monkeypatch
):
    path = checkpoint("nvidia-adapter", evict_rate=0.7, min_margin=8.0, dtype=torch.bfloat16)
    token_ids = prompts((97, 230, 512))
    check_no_further_than_stock(
        make_engine, monkeypatch, path, path, token_ids, ROUNDING["fp8"], quantization="fp8"
    )


@pytest.mark.parametrize("quantize", [quantize_gptq, quantize_awq], ids=["GPTQ", "AWQ"])
def test_a_channel_borrowed_from_4_bits_is_refused(checkpoint, make_engine, tmp_path, quantize):
    quantized, _ = quantize(checkpoint("nvidia-borrowed", dtype=torch.bfloat16), tmp_path)
    with pytest.raises(ValueError, match="less than 8 bits"):
        make_engine(quantized, **bf16())
