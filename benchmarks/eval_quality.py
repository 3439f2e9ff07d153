"""What eviction costs a DMS checkpoint, and what evicting blindly would cost with the same memory.

    python benchmarks/eval_quality.py [MODEL] [--lengths 1024,2048,4096] [--prompts 16]

Needle questions (examples/tiny/needles.py) in long documents. Arms through vLLM: eviction off,
dms, dms_fp8. Controls through the reference model, which can be told whom to evict: random (the
same share of every head) and window only (as long as what dms keeps). Writes quality.json and
quality.png into --out. Known limits: with --logprobs below the vocabulary's size the engine's KL is
a lower bound (all tokens not listed count as one); the controls' needles are teacher-forced, the
engine's are generated.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.quality import controls, engine, plots  # noqa: E402
from benchmarks.quality.task import Task  # noqa: E402

EMBEDDED = ROOT / "vllm_dms" / "assets" / "tiny"
ARMS = ("off", "dms", "dms_fp8")
KEYS = ("model", "length", "arm")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", type=Path, nargs="?", default=EMBEDDED)
    parser.add_argument(
        "--lengths", type=lambda s: [int(x) for x in s.split(",")], default=[1024, 2048, 4096]
    )
    parser.add_argument("--prompts", type=int, default=16, help="documents a length")
    parser.add_argument("--asked", type=int, default=3, help="needles asked of each document")
    parser.add_argument(
        "--scored", type=int, default=2, help="documents a length whose KL is measured"
    )
    parser.add_argument(
        "--arms", type=lambda s: s.split(","), default=list(ARMS), help="of the engine, off first"
    )
    parser.add_argument("--logprobs", type=int, default=-1, help="compared per position; -1: all")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--kv-gib", type=float, default=0.5, help="KV cache of the engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="where there is no .git to ask")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser


def engine_rows(task: Task, args: argparse.Namespace) -> list[dict]:
    """Rows of the engine's arms; each engine is a process of its own, and frees all its memory."""
    rows, truth = [], None
    for arm in args.arms:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result = pool.submit(
                engine.run_arm, arm, task, args.dtype, args.logprobs, args.kv_gib
            ).result()
        truth = result.scores if arm == "off" else truth
        for length in task.lengths:
            row = task.summarize(length, result.hits[length], result.compression[length])
            rows.append(
                {
                    "arm": arm,
                    "method": "vllm, generated",
                    **row,
                    **engine.distance(truth[length], result.scores[length], task.starts[length]),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def merge(path: Path, rows: list[dict]) -> list[dict]:
    """Rows of earlier runs stay, unless measured again."""
    new = {tuple(r[k] for k in KEYS) for r in rows}
    old = json.loads(path.read_text()) if path.is_file() else []
    return [r for r in old if tuple(r[k] for k in KEYS) not in new] + rows


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if args.arms[:1] != ["off"] or not set(args.arms) <= set(ARMS):
        raise SystemExit(
            f"--arms is {','.join(args.arms)}: start with off, the others are compared with it; "
            f"known arms: {', '.join(ARMS)}."
        )
    task = Task.build(args.model, args.lengths, args.prompts, args.asked, args.scored, args.seed)
    served, rows = controls.run_controls(task, args.dtype)
    rows = engine_rows(task, args) + rows
    stamp = {
        "commit": args.commit or commit(),
        "vllm": engine.version(),
        "device": engine.device(),
        "dtype": args.dtype,
        "window": served.window,
        "seed": args.seed,
        "command": " ".join(["python", *sys.argv]),
    }
    resolved = args.model.resolve()
    model = str(resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else args.model)
    rows = [{"model": model, **row, **stamp} for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "quality.json"
    path.write_text(json.dumps(merge(path, rows), indent=1) + "\n")
    plots.draw(rows, served.live_share, args.out / "quality.png")
    print(f"wrote {path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
