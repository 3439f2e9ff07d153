"""What an engine is asked about real text, and what is made of its answers."""

from dataclasses import dataclass, field

import numpy as np

from . import ruler
from .engine import _table


@dataclass(frozen=True)
class Plan:
    """The same for every arm. Token ids, no padding."""

    scored: int  # the last tokens of each text that count
    texts: dict[int, list[list[int]]]  # by context length; the same last tokens in each
    # By task and length: prompts with their samples.
    tasks: dict[tuple[str, int], list[tuple[list[int], ruler.Sample]]] = field(default_factory=dict)
    openings: list[list[int]] = field(default_factory=list)  # to be gone on with
    generate: int = 0  # tokens
    seed: int = 0


@dataclass
class Answers:
    """Of one arm."""

    # By length: token ids and log-probabilities (scored, K), and those of the text (scored).
    tables: dict[int, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    own: dict[int, list[np.ndarray]] = field(default_factory=dict)
    tasks: dict[tuple[str, int], float] = field(default_factory=dict)
    written: list[list[int]] = field(default_factory=list)
    written_logprobs: list[np.ndarray] = field(default_factory=list)
    live: dict[str, float] = field(default_factory=dict)  # compression by what was asked


def answer(llm, plan: Plan, logprobs: int, others: list[list[int]] | None = None) -> Answers:
    """others: openings gone on with by other arms, to be scored; they come in `own` under 0."""
    found = Answers()
    score_texts(llm, plan, logprobs, found)
    solve_tasks(llm, plan, found)
    write_on(llm, plan, found)
    if others:
        found.own[0] = [own for own, _ in score(llm, others, 1)]
    return found


def score_texts(llm, plan: Plan, logprobs: int, found: Answers) -> None:
    for length, texts in plan.texts.items():
        rows = score(llm, texts, logprobs, found, f"text {length}")
        found.own[length] = [own[-plan.scored :] for own, _ in rows]
        found.tables[length] = [tuple(x[-plan.scored :] for x in table) for _, table in rows]


def score(llm, texts, logprobs: int, found: Answers | None = None, name: str = "") -> list[tuple]:
    """-> of each text (T) log-probabilities of its own tokens (T - 1), and the best ones' table"""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=1, prompt_logprobs=logprobs, flat_logprobs=True, detokenize=False
    )
    outputs = _generate(llm, texts, params)
    if found:
        note_compression(found, name, outputs)
    rows = []
    for output in outputs:
        flat = output.prompt_logprobs
        own = np.array([flat.logprobs[start] for start in flat.start_indices[1:]])
        rows.append((own, _table(flat)))
    return rows


def solve_tasks(llm, plan: Plan, found: Answers) -> None:
    from vllm import SamplingParams

    for (task, length), asked in plan.tasks.items():
        params = SamplingParams(temperature=0, max_tokens=ruler.ANSWER_TOKENS[task])
        outputs = _generate(llm, [ids for ids, _ in asked], params)
        note_compression(found, f"{task} {length}", outputs)
        scores = [s.score(o.outputs[0].text) for (_, s), o in zip(asked, outputs, strict=True)]
        found.tasks[task, length] = sum(scores) / len(scores)


def write_on(llm, plan: Plan, found: Answers) -> None:
    """Sampled from the arm itself, so that the mean of log q - log p over what it writes is
    KL(arm || truth)."""
    from vllm import SamplingParams

    if not plan.generate:
        return
    params = SamplingParams(
        temperature=1, max_tokens=plan.generate, ignore_eos=True, logprobs=1, detokenize=False
    )
    outputs = _generate(llm, plan.openings, params)
    note_compression(found, "generation", outputs)
    for output in outputs:
        done = output.outputs[0]
        ids = list(done.token_ids)
        found.written.append(ids)
        each = zip(done.logprobs, ids, strict=True)
        found.written_logprobs.append(np.array([at[token].logprob for at, token in each]))


def _generate(llm, prompts, params) -> list:
    return llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


def note_compression(found: Answers, name: str, outputs) -> None:
    stats = [(o.kv_transfer_params or {}).get("dms") for o in outputs]
    if all(stats):
        live, dense = (sum(s[key] for s in stats) for key in ("live_tokens", "dense_tokens"))
        found.live[name] = round(dense / live, 3)


def perplexity(own: list[np.ndarray]) -> float:
    return float(np.exp(-np.concatenate(own).mean()))


def divergence(mine: list[np.ndarray], true: list[np.ndarray]) -> dict:
    """Log-probabilities of what an arm wrote, by itself and by the truth -> KL(arm || truth) a
    token, with the standard error over texts, None of a single one."""
    means = np.array([(q - p).mean() for q, p in zip(mine, true, strict=True)])
    error = float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else None
    tokens = sum(len(q) for q in mine)
    return {"kl": float(means.mean()), "kl_standard_error": error, "tokens": tokens}
