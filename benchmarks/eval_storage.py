"""What a cache costs on plain text: KL to the same model with all of its cache in its own dtype.

    python benchmarks/eval_storage.py MODEL --text FILE [--adapter DIR] [--arms off,off_int4]

Documents of --length tokens, one after the other from the text, every position scored. Arms are
those of eval_quality.py: DMS is compared with the first DMS arm asked for, stock caches with the
first stock one. With an adapter, stock caches serve MODEL as it is. Writes quality_storage.json
into --out. Known limit: of each position the --logprobs likeliest tokens are compared, and all
others as one.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from evaluation import RESULTS, documents, make_parser, names, stamp

from benchmarks.quality import engine


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path)
    add("--text", type=Path, required=True)
    add("--adapter", type=Path, help="decisions over MODEL")
    add("--arms", type=names, default=[*engine.ARM_SETTINGS][:6])
    add("--length", type=int, default=2048)
    add("--documents", type=int, default=4)
    add("--logprobs", type=int, default=256)
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add("--chunk", type=int, default=128, help="tokens read at a time; within it none are rounded")
    add("--kv-gib", type=float, default=0.5, help="KV cache of the engine")
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def score_arm(arm: str, args: argparse.Namespace, token_ids: list[list[int]]):
    settings = (args.dtype, args.logprobs, args.kv_gib, args.chunk, args.adapter)
    llm = engine.start(arm, args.model, args.length, *settings)
    tables, outputs = engine.score(llm, token_ids, args.logprobs)
    return tables, engine.compression(outputs)


def main() -> None:
    args = parse_args()
    token_ids = documents(args)
    about = {"dtype": args.dtype, "chunk": args.chunk, **stamp(args)}
    rows, truths = [], {}
    for arm in args.arms:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            tables, live = pool.submit(score_arm, arm, args, token_ids).result()
        truth = truths.setdefault(engine.ARM_SETTINGS[arm][1] is None, (arm, tables))
        row = {"model": args.model.name, "arm": arm, "against": truth[0], "length": args.length}
        row |= {"live_compression": round(live, 3)}
        row |= engine.distance(truth[1], tables, [0] * len(tables))
        rows.append(row | about)
        print(json.dumps(row), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quality_storage.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
