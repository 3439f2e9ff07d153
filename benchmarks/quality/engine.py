"""Arms that vLLM answers. Imported in the parent too, so vLLM is imported only where it runs."""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .task import Task

# --kv-cache-dtype, and the plugin's settings; None: stock vLLM, which serves the checkpoint without
# its decisions.
ARM_SETTINGS: dict[str, tuple[str, dict | None]] = {
    "off": ("dms", {"evict": False}),
    "off_fp8": ("dms_fp8", {"evict": False}),
    "off_int4": ("dms_int4", {"evict": False}),
    "dms": ("dms", {}),
    "dms_fp8": ("dms_fp8", {}),
    "dms_int4": ("dms_int4", {}),
    "bf16": ("auto", None),
    "fp8": ("fp8", None),
    "turboquant_4bit_nc": ("turboquant_4bit_nc", None),
    "int4_per_token_head": ("int4_per_token_head", None),
}
ANSWER_TOKENS = 64


@dataclass
class ArmResult:
    """By length."""

    hits: dict[int, list[list[bool]]]  # per question, per needle
    compression: dict[int, float]  # dense over live tokens at the end, as the plugin reports it
    # Token ids and log-probabilities (T - 1, K) of each scored question.
    scores: dict[int, list[tuple[np.ndarray, np.ndarray]]]


def start(
    arm: str,
    model: Path,
    length: int,
    dtype: str,
    logprobs: int,
    kv_gib: float,
    chunk: int,
    adapter: Path | None = None,
):
    """vLLM for prompts of up to ``length`` tokens, read ``chunk`` at a time: what is in a chunk is
    seen by it before it is rounded. ``adapter``: where the decisions are, if not in the model."""
    # Before vLLM's import: this process is the engine's own, and on a CPU one thread is exact.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from vllm import LLM

    cache, settings = ARM_SETTINGS[arm]
    if settings is None and adapter is None:
        model = dense_copy(model)
    elif settings is not None and adapter is not None:
        settings = settings | {"adapter": str(adapter)}
    # log-probabilities of a chunk are held at once: (chunk, vocabulary) in fp32
    return LLM(
        str(model),
        kv_cache_dtype=cache,
        dtype=dtype,
        max_model_len=length + ANSWER_TOKENS,
        enforce_eager=True,
        kv_cache_memory_bytes=int(kv_gib * 2**30),
        gpu_memory_utilization=0.25,  # must be free at the start: others may use the GPU, too
        max_num_batched_tokens=chunk,
        max_num_seqs=16,
        max_logprobs=logprobs,
        additional_config={} if settings is None else {"dms": settings},
    )


def compression(outputs: list) -> float:
    """Dense over live tokens, as the plugin reports them; of stock vLLM 1."""
    if outputs[0].kv_transfer_params is None:
        return 1.0
    stats = [o.kv_transfer_params["dms"] for o in outputs]
    live, dense = (sum(s[key] for s in stats) for key in ("live_tokens", "dense_tokens"))
    return dense / live


def score(llm, token_ids: list[list[int]], logprobs: int):
    """Of each prompt its `_table`, and what vLLM gave."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=logprobs, flat_logprobs=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in token_ids]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [_table(o.prompt_logprobs) for o in outputs], outputs


def run_arm(
    arm: str, task: Task, dtype: str, logprobs: int, kv_gib: float, chunk: int
) -> ArmResult:
    llm = start(arm, task.model, max(task.questions), dtype, logprobs, kv_gib, chunk)
    from vllm import SamplingParams

    generate = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
    result = ArmResult({}, {}, {})
    for length, questions in task.questions.items():
        prompts = [{"prompt_token_ids": q.prompt} for q in questions]
        outputs = llm.generate(prompts, generate, use_tqdm=False)
        result.hits[length] = [
            [code in o.outputs[0].text for code in q.codes]
            for q, o in zip(questions, outputs, strict=True)
        ]
        result.compression[length] = compression(outputs)
        scored = [q.prompt + q.answer for q in questions[: task.scored]]
        result.scores[length], _ = score(llm, scored, logprobs)
    return result


def dense_copy(model: Path) -> Path:
    """An adapter checkpoint without its decisions, in a folder of its own: for stock vLLM."""
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text())
    if not config.get("dms_separate_alpha"):
        raise SystemExit(f"{model} borrows channels for its decisions: stock vLLM would use them.")
    out = Path(tempfile.mkdtemp(prefix="dense-"))
    shutil.copytree(model, out, dirs_exist_ok=True)
    config = {key: value for key, value in config.items() if not key.startswith("dms_")}
    config["architectures"] = [name.removesuffix("DMS") for name in config["architectures"]]
    (out / "config.json").write_text(json.dumps(config))
    for file in out.glob("*.safetensors"):
        weights = {name: w for name, w in load_file(file).items() if "dms_" not in name}
        save_file(weights, file, metadata={"format": "pt"})
    return out


def _table(flat) -> tuple[np.ndarray, np.ndarray]:
    """FlatLogprobs of T positions, none at the first -> token ids, log-probabilities (T - 1, K).

    The text's own token comes first, whether or not it is among the K best that follow.
    """
    rows = len(flat.start_indices) - 1
    ids, values = (np.asarray(x).reshape(rows, -1)[:, 1:] for x in (flat.token_ids, flat.logprobs))
    order = ids.argsort(1)
    return np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)


def distance(truth: list, guess: list, starts: list[int]) -> dict:
    """KL(truth || guess) over the tokens that both list, with all others as one more token."""
    kls, same = [], []
    for (ids_p, p), (ids_q, q), start in zip(truth, guess, starts, strict=True):
        # Row i predicts position i + 1, so it is the query at position i.
        for row in range(start, len(p)):
            _, at_p, at_q = np.intersect1d(
                ids_p[row], ids_q[row], assume_unique=True, return_indices=True
            )
            log_p, log_q = p[row][at_p], q[row][at_q]
            rest_p, rest_q = (max(1 - np.exp(x).sum(), 0.0) for x in (log_p, log_q))
            kl = (np.exp(log_p) * (log_p - log_q)).sum()
            if rest_p > 1e-5:  # below that it is the rounding of a sum over the whole vocabulary
                kl += rest_p * np.log(rest_p / max(rest_q, 1e-9))
            kls.append(kl)
            same.append(ids_p[row][p[row].argmax()] == ids_q[row][q[row].argmax()])
    return summary(np.array(kls), np.array(same))


def summary(kls: np.ndarray, same: np.ndarray) -> dict:
    """By scored position: KL, and whether the likeliest token is the same."""
    if not len(kls):
        return {"kl_mean": 0.0, "kl_max": 0.0, "top1_agreement": 1.0, "scored_positions": 0}
    return {
        "kl_mean": round(float(kls.mean()), 6),
        "kl_max": round(float(kls.max()), 4),
        "top1_agreement": round(float(same.mean()), 5),
        "scored_positions": len(kls),
    }
