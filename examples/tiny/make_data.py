"""Writes needle texts: training rows for the retrofit, or held-out prompts with their answers.

python -m examples.tiny.make_data --out FILE.jsonl [--rows 512] [--length 4096] [--seed 0]
python -m examples.tiny.make_data --out FILE.jsonl --prompts [--asked 3] [--kind report]
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from random import Random

from . import needles


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument(
        "--length", type=int, default=4096, help="tokens of the tiny model's tokenizer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--prompts", action="store_true", help="held-out prompts, not training rows"
    )
    parser.add_argument("--asked", type=int, default=1, help="facts that a prompt asks for")
    parser.add_argument(
        "--kind",
        choices=("ask", "report"),
        default="ask",
        help="report: recalls while writing text",
    )
    args = parser.parse_args(argv)
    if args.prompts:
        prompts = needles.make_prompts(
            args.seed, args.length, args.rows, asked=args.asked, kind=args.kind
        )
        records = [asdict(p) for p in prompts]
    else:
        records = [
            {"text": needles.training_text(Random(f"retrofit:{args.seed}:{i}"), args.length)}
            for i in range(args.rows)
        ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)


if __name__ == "__main__":
    main()
