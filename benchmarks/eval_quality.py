"""What eviction costs a DMS checkpoint, and what evicting blindly would cost with the same memory.

    python benchmarks/eval_quality.py [MODEL] [--lengths 1024,2048,4096] [--prompts 16]

Needle questions (examples/tiny/needles.py) in long documents. Arms through vLLM (--arms): dms,
dms_fp8, dms_int4, with eviction and with it off (off, off_fp8, off_int4), compared with off; and
vLLM's own caches (bf16, fp8, turboquant_4bit_nc, int4_per_token_head; some need a GPU) of the same
model without its decisions, compared with bf16. Controls through the reference model, which can be
told whom to evict: random (the same share of every head) and window only (as long as what dms
keeps). Writes quality.json and quality.png into --out. Known limits: with --logprobs below the
vocabulary's size the engine's KL is a lower bound (all tokens not listed count as one); the
controls' needles are teacher-forced, the engine's are generated.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from evaluation import EMBEDDED, RESULTS, make_parser, names, numbers, stamp

from benchmarks.quality import controls, engine, plots
from benchmarks.quality.task import Task


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, nargs="?", default=EMBEDDED)
    add("--lengths", type=numbers, default=[1024, 2048, 4096])
    add("--prompts", type=int, default=16, help="documents a length")
    add("--asked", type=int, default=3, help="needles asked of each document")
    add("--scored", type=int, default=2, help="documents a length whose KL is measured")
    add("--logprobs", type=int, default=-1, help="compared per position; -1: all")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--kv-gib", type=float, default=0.5, help="KV cache of the engine")
    add("--arms", type=names, default=["off", "dms", "dms_fp8", "dms_int4"])
    add("--no-controls", action="store_true", help="only the arms; all positions are scored")
    add("--chunk", type=int, default=2048, help="tokens read at a time")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def engine_rows(task: Task, args: argparse.Namespace) -> list[dict]:
    """Rows of the engine's arms; each engine is a process of its own, and frees all its memory."""
    rows, truths = [], {}
    for arm in args.arms:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            others = (args.dtype, args.logprobs, args.kv_gib, args.chunk)
            result = pool.submit(engine.run_arm, arm, task, *others).result()
        stock = engine.ARM_SETTINGS[arm][1] is None
        truth = truths.setdefault(stock, result.scores)  # of the first: off, bf16
        for length in task.questions:
            row = {"arm": arm, "method": "vllm, generated"}
            row |= task.summarize(length, result.hits[length], result.compression[length])
            row |= engine.distance(truth[length], result.scores[length], task.starts[length])
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    args = parse_args()
    task = Task.build(args.model, args.lengths, args.prompts, args.asked, args.scored, args.seed)
    if args.no_controls:
        controlled = []
        task.starts = {n: [0] * args.scored for n in task.questions}
    else:
        controlled = controls.run_controls(task, args.dtype)  # first: it finds what is scored
    rows = engine_rows(task, args) + controlled
    about = {"dtype": args.dtype, "seed": args.seed, "chunk": args.chunk, **stamp(args)}
    model = "vllm_dms/assets/tiny" if args.model == EMBEDDED else str(args.model)
    rows = [{"model": model, **row, **about} for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality.json").write_text(json.dumps(rows, indent=1) + "\n")
    plots.draw(rows, args.out / "quality.png")


if __name__ == "__main__":
    main()
