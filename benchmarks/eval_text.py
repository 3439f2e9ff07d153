"""Quality on real text that others can compare: a base model and its adapter, beside caches of the
same memory.

    python benchmarks/eval_text.py BASE --adapter DIR --text FILE --out FILE.json
        [--arms off,dms,dms_fp8,window,random] [--lengths 2048,4096,8192]

Perplexity and KL of each text's last 1,024 tokens, the context 2K, 4K and 8K long (a token less);
tasks by RULER's recipe (quality/ruler.py); 1,024 tokens that an arm samples from itself, decisions
taken while decoding, and their KL by what --truth says of them.

Arms: those of quality/engine.py; `auto` (stock vLLM); `window`: everything is evicted that leaves
a window as long as what dms keeps at the longest length; `random`: quality/blind.py, text alone.
Known limits: with --logprobs below the vocabulary's size an engine's KL is a lower bound.
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from evaluation import make_parser, names, numbers, stamp

from benchmarks.quality import ruler, texts
from benchmarks.quality.engine import ARM_SETTINGS, distance

ARMS: dict[str, tuple[str, dict | None]] = {**ARM_SETTINGS, "auto": ("auto", None)}
NEVER = -1e4  # an alpha_offset below every logit: everything is evicted


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("base", metavar="BASE", type=Path)
    add("--adapter", type=Path, required=True)
    add("--text", required=True, help="as --data of the retrofit; not trained on")
    add("--arms", type=names, default="dms,dms_fp8,window,random,auto")
    add("--truth", default="auto", help="the arm that others are compared with; it runs last")
    add("--lengths", type=numbers, default="2048,4096,8192")
    add("--scored", type=int, default=1024, help="tokens at the end of a text that count")
    add("--rows", type=int, default=8, help="texts")
    add("--tasks", type=names, default=",".join(ruler.TASKS))
    add("--samples", type=int, default=8, help="of each task and length")
    add("--generate", type=int, default=1024, help="tokens that an arm writes")
    add("--openings", type=int, default=8, help="texts that it goes on with")
    add("--logprobs", type=int, default=64, help="compared per position; -1: all")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--kv-gib", type=float, default=4.0, help="KV cache of the engine")
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    unknown = [a for a in (*args.arms, args.truth) if a not in (*ARMS, "window", "random")]
    unknown += [task for task in args.tasks if task not in ruler.TASKS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: arms are {', '.join(ARMS)}, window, random; tasks are "
                     f"{', '.join(ruler.TASKS)}.")  # fmt: skip
    if "window" in args.arms and "dms" not in args.arms[: args.arms.index("window")]:
        parser.error("--arms: window takes its length from dms, which must come before it.")
    return args


def make_plan(args: argparse.Namespace) -> texts.Plan:
    from transformers import AutoTokenizer

    from vllm_dms.retrofit import data

    tokenizer = AutoTokenizer.from_pretrained(args.base)
    longest = max(args.lengths)
    most = max(args.rows, args.openings)
    rows = data.load_rows(args.text, tokenizer, longest, most)[:most].tolist()
    source = " ".join(data.read_texts(args.text, tokenizer))
    sentences = ruler.sentences_of(source[:1_000_000])

    def prompt(sample: ruler.Sample) -> list[int]:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": sample.question}], add_generation_prompt=True,
            return_dict=True,
        )  # fmt: skip
        begun = tokenizer(sample.begun, add_special_tokens=False)
        return [*asked.input_ids, *begun.input_ids]

    tasks: dict[tuple[str, int], list] = {}
    for task in args.tasks:
        for length in args.lengths:
            room = length - ruler.ANSWER_TOKENS[task]
            made = [
                ruler.make(task, args.seed + n, room, lambda s: len(prompt(s)), sentences)
                for n in range(args.samples)
            ]
            if all(made):
                tasks[task, length] = [(prompt(sample), sample) for sample in made]
    opening = max(longest - 1 - args.generate, 1)
    return texts.Plan(
        args.scored,
        {n: [row[-(n - 1) :] for row in rows[: args.rows]] for n in args.lengths},
        tasks,
        [row[: min(1024, opening)] for row in rows[: args.openings]],
        args.generate,
        args.seed,
    )


def run_arm(args, arm: tuple[str, dict | None], plan: texts.Plan, others) -> texts.Answers:
    """In a process of its own, the engine's, too; it frees all memory at its end."""
    # Before vLLM's import; on a CPU one thread is exact.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from vllm import LLM

    cache, settings = arm
    dms = None if settings is None else {"adapter": str(args.adapter.resolve()), **settings}
    llm = LLM(
        str(args.base),
        kv_cache_dtype=cache,
        dtype=args.dtype,
        seed=args.seed,  # not by request: with those a CPU can't cut a prompt in chunks
        max_model_len=max(args.lengths),
        enforce_eager=True,
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
        gpu_memory_utilization=0.25,  # must be free at the start: others may use the GPU, too
        max_num_batched_tokens=2048,
        max_num_seqs=16,
        max_logprobs=args.logprobs,
        enable_prefix_caching=False,
        additional_config={} if dms is None else {"dms": dms},
    )
    return texts.answer(llm, plan, args.logprobs, others)


def in_a_process(args, arm, plan, others=None) -> texts.Answers:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_arm, args, arm, plan, others).result()


def window_of(found: texts.Answers, length: int) -> int:
    """The window that holds as many tokens as the arm keeps of a text of this length."""
    return max(round((length - 1) / found.live[f"text {length}"]) - 1, 1)


def row_of(name: str, arm, found: texts.Answers, truth: texts.Answers | None, written=None) -> dict:
    """truth: None while it is not known; written: of this arm's texts, log-probabilities by it"""
    text = {}
    for length, own in found.own.items():
        text[length] = {"perplexity": round(texts.perplexity(own), 4)}
        if truth:
            starts = [0] * len(own)
            text[length] |= distance(truth.tables[length], found.tables[length], starts)
    row = {"arm": name, "method": "vLLM", "kv_cache_dtype": arm[0], "settings": arm[1]}
    row |= {"text": text, "tasks": {f"{t} {n}": score for (t, n), score in found.tasks.items()}}
    if written:
        row["generation"] = texts.divergence(found.written_logprobs, written)
    return {**row, "live_compression": found.live}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    plan = make_plan(args)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    report = {**stamp(args), "settings": settings}
    arms, answers = dict(ARMS), {}
    for name in (a for a in args.arms if a not in ("random", args.truth)):
        if name == "window":
            window = window_of(answers["dms"], max(args.lengths))
            arms[name] = ("dms", {"window": window, "alpha_offset": NEVER})
        answers[name] = in_a_process(args, arms[name], plan)
        report["rows"] = [row_of(a, arms[a], found, None) for a, found in answers.items()]
        args.out.write_text(json.dumps(report, indent=1) + "\n")  # what a time limit leaves
        print(json.dumps(report["rows"][-1]), flush=True)
    others = [
        [*opening, *ids]
        for found in answers.values()
        for opening, ids in zip(plan.openings, found.written, strict=False)
    ]
    truth = answers[args.truth] = in_a_process(args, arms[args.truth], plan, others)
    scored = iter(truth.own.pop(0, []))
    report["rows"] = []
    for name, found in answers.items():
        # What the truth wrote, nobody but itself could judge.
        texts_of = found.written if name != args.truth else []
        written = [next(scored)[-len(ids) :] for ids in texts_of]
        report["rows"].append(row_of(name, arms[name], found, truth, written))
    if "random" in args.arms:
        from benchmarks.quality.blind import blind

        report["rows"] += blind(args.base, args.adapter, plan, args.dtype)
    for row in report["rows"]:
        print(json.dumps(row), flush=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
