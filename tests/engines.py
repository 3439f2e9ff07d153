"""Engines of the tests, what they are asked, and how far they are from the reference."""

import json

from checkpoints import random_tokens

from vllm_dms.reference import ReferenceModel

NOISE = 1e-3  # nats; fp32 rounding is about 3e-5, the mildest wrong rule about 3e-2
LENGTHS = (20, 97, 230, 512, 700, 1200)
GENERATED = 70


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


def engine_config(path, **kwargs):
    """What vLLM makes of the flags, without an engine."""
    from vllm.engine.arg_utils import EngineArgs

    args = {"kv_cache_dtype": "dms", "max_model_len": 512, "enforce_eager": True, **kwargs}
    return EngineArgs(model=str(path), **args).create_engine_config()


def sampling(max_tokens=GENERATED):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=3, detokenize=False
    )


def prompts(lengths=LENGTHS, seed=0):
    return [random_tokens(n, seed=seed + i) for i, n in enumerate(lengths)]


def generate(llm, token_ids, params):
    return llm.generate([{"prompt_token_ids": ids} for ids in token_ids], params, use_tqdm=False)


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def worst_error(reference: ReferenceModel, prompt, output) -> float:
    """Largest difference of any returned log-probability from the reference's."""
    ids = list(output.outputs[0].token_ids)
    logits = reference.forward(prompt + ids).logits.log_softmax(-1)
    worst = 0.0
    for step, entries in enumerate(output.outputs[0].logprobs):
        row = logits[len(prompt) - 1 + step]
        worst = max(worst, *(abs(row[t].item() - lp.logprob) for t, lp in entries.items()))
    return worst


def check_exact(path, llm, token_ids, params=None):
    reference = ReferenceModel.from_dir(path)
    outputs = generate(llm, token_ids, params or sampling())
    for prompt, output in zip(token_ids, outputs, strict=True):
        assert worst_error(reference, prompt, output) < NOISE


def edit_config(path, out_dir, **changes):
    """A copy of a checkpoint with config.json changed; None removes a key."""
    out_dir.mkdir(exist_ok=True)
    for file in path.iterdir():
        (out_dir / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    (out_dir / "config.json").write_text(json.dumps(config))
    return out_dir
