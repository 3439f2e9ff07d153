"""4-bit storage in the whole engine: what it computes, how large it is, how near it stays."""

from engines import NOISE, engine_args, generate, prompts, sampling, worst_error
from test_fp8 import mean_kl, score

from vllm_dms import reference
from vllm_dms.arena.storage import Int4Storage
from vllm_dms.backend.runtime import get_runtime
from vllm_dms.reference import ReferenceModel


def rounded(query, key, value, mask, scale, exact=reference.attention):
    """Attention to K and V as 4-bit pages hold them."""
    storage = Int4Storage()
    key = storage.decode_key(*storage.encode_key(key))
    return exact(query, key, storage.decode(*storage.encode(value)), mask, scale)


def test_token_by_token_it_is_the_reference_with_rounded_k_and_v(
    checkpoint, make_engine, monkeypatch
):
    """So fed, every key is read from its page, the token's own as well."""
    path = checkpoint("nvidia-borrowed", head_dim=64, min_margin=5.0)
    llm = make_engine(path, **engine_args(1, kv_cache_dtype="dms_int4", max_num_seqs=1))
    (token_ids,) = prompts((75,), seed=3)
    (output,) = generate(llm, [token_ids], sampling(30))
    model = ReferenceModel.from_dir(path)
    assert worst_error(model, token_ids, output) > 0.1  # or the next line would mean nothing
    monkeypatch.setattr(reference, "attention", rounded)
    assert worst_error(model, token_ids, output) < NOISE


def test_int4_pages_are_small_and_stay_close(checkpoint, make_engine):
    path = checkpoint("nvidia-borrowed", head_dim=64, min_margin=5.0)
    exact = score(path, make_engine, "dms")
    int4 = score(path, make_engine, "dms_int4")
    assert 0 < mean_kl(exact, int4) < 0.1
    args = engine_args(48, kv_cache_dtype="dms_int4", dtype="bfloat16", max_logprobs=-1)
    layout = get_runtime(make_engine(path, **args).llm_engine.vllm_config).layout
    # 32 bytes of nibbles, and two for each of four groups.
    assert layout.page_bytes == layout.page_size * 2 * (32 + 8)
