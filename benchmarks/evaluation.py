"""What the eval_*.py have in common. Importing it lets a script that was started by its path import
`benchmarks`, `examples` and the package."""

import argparse
import sys
from pathlib import Path
from typing import Any

from certificate import certificate, command_and_date

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

EMBEDDED = ROOT / "vllm_dms" / "assets" / "tiny"
RESULTS = ROOT / "benchmarks" / "results"


def make_parser(doc: str) -> argparse.ArgumentParser:
    """``doc``: the script's own"""
    parser = argparse.ArgumentParser(
        description=doc.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--commit", help="where there is no .git to ask")
    return parser


def names(text: str) -> list[str]:
    """Of an argument that is a list."""
    return [name for name in text.split(",") if name]


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def stamp(args: argparse.Namespace) -> dict[str, Any]:
    """Where a row is from."""
    return {**certificate(args.commit), **command_and_date()}


def documents(args: argparse.Namespace) -> list[list[int]]:
    """The first ``args.documents`` times ``args.length`` tokens of the file ``args.text``."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(args.model)(args.text.read_text(), verbose=False).input_ids
    starts = range(0, len(ids) - args.length + 1, args.length)[: args.documents]
    if len(starts) < args.documents:
        raise SystemExit(f"{args.text} has {len(ids)} tokens: too few. Lower --documents.")
    return [ids[start : start + args.length] for start in starts]
