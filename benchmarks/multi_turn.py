"""Conversations with a server that keeps their cache: time to first token, and in all.

    python benchmarks/multi_turn.py --url http://127.0.0.1:8000 --model NAME --out turns.json

Conversations run at once, each a turn at a time: a message of random tokens, an answer of fixed
length, then all of that and the next message. With --document all first messages begin with the
same tokens and there is one turn: questions about a document, the first of them asked alone.
Only the standard library; a thread for each conversation.
"""

import argparse
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen


def ask(options: argparse.Namespace, prompt: list[int]) -> dict[str, Any]:
    """One answer: its token ids, when its first token came, how many tokens the cache had."""
    body = {
        "model": options.model, "prompt": prompt, "max_tokens": options.answer, "stream": True,
        "ignore_eos": True, "temperature": 1.0, "return_token_ids": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    headers = {"Content-Type": "application/json"}
    request = Request(f"{options.url}/v1/completions", json.dumps(body).encode(), headers)
    start, first, ids, usage = time.perf_counter(), 0.0, [], {}
    with urlopen(request, timeout=options.seconds) as response:
        for raw in response:
            line = raw.decode().strip()
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                first = first or time.perf_counter() - start
                ids += choice.get("token_ids") or []
    if len(ids) != options.answer:
        raise SystemExit(f"{len(ids)} tokens of {options.answer} came: {usage}")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {"ids": ids, "ttft_s": first, "cached": cached, "prompt": len(prompt)}


def talk(options: argparse.Namespace, index: int, document: list[int]) -> list[dict[str, Any]]:
    tokens = random.Random(f"{options.seed} {index}")
    text, turns = list(document), []
    for turn in range(options.turns):
        text += tokens.choices(range(100, 400), k=options.message)
        answer = ask(options, text)
        text += answer.pop("ids")
        turns.append(answer | {"turn": turn})
    return turns


def run(options: argparse.Namespace) -> dict[str, Any]:
    document = random.Random(options.seed).choices(range(100, 400), k=options.document)
    warm = [talk(options, -1 - i, document) for i in range(2 if options.document else 1)]
    start = time.perf_counter()
    with ThreadPoolExecutor(options.at_once) as pool:
        talks = pool.map(lambda i: talk(options, i, document), range(options.conversations))
        turns = [turn for turns in talks for turn in turns]
    seconds = time.perf_counter() - start
    later = [t for t in turns if t["turn"]] or turns
    return {
        "settings": {k: v for k, v in vars(options).items() if k != "out"},
        "seconds": round(seconds, 3),
        "mean_ttft_ms": round(1000 * statistics.mean(t["ttft_s"] for t in turns), 2),
        "mean_later_ttft_ms": round(1000 * statistics.mean(t["ttft_s"] for t in later), 2),
        "cached_share": sum(t["cached"] for t in turns) / sum(t["prompt"] for t in turns),
        "turns": turns,
        "before": warm,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--url", required=True)
    add("--model", required=True, help="the name that the server has for it")
    add("--out", type=Path, required=True)
    add("--conversations", type=int, default=32)
    add("--at-once", type=int, default=32)
    add("--turns", type=int, default=8)
    add("--message", type=int, default=1024, help="tokens")
    add("--answer", type=int, default=256, help="tokens")
    add("--document", type=int, default=0, help="tokens that all conversations begin with")
    add("--seconds", type=float, default=300, help="longest wait for an answer")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    options = parse_args()
    result = run(options)
    options.out.write_text(json.dumps(result) + "\n")
    print({k: v for k, v in result.items() if k not in ("turns", "before")})
