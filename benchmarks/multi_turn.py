"""What a prefix cache is for: conversations of several turns, and many questions about one text.

A server of the arm answers, with vLLM's prefix caching or DMS's own.
"""

import json
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import Arm
from conversations import TOKENS, Client, Conversation, Turn, at_once
from record import Row
from through_server import serving

KEPT = 0.9  # share of what was said that the next turn must find, to count as a hit


@dataclass(frozen=True)
class Talks:
    """Conversations, ``at_once`` of them at a time, each a turn at a time; lengths in tokens."""

    conversations: int
    at_once: int
    turns: int
    message: int
    answer: int
    document: int = 0  # what all of them begin with


@dataclass(frozen=True)
class Kept:
    """A growing number of conversations: first turns of the new ones, then a turn of all."""

    at_once: int
    first: int  # message of a first turn
    further: int  # and of others
    answer: int
    most: int = 4096  # conversations


TALKS = {
    "turns-1k-256": (Talks(32, 32, turns=8, message=1024, answer=256),),
    "document-16k": tuple(Talks(64, c, 1, message=100, answer=16, document=16384) for c in (1, 64)),
    "kept-8k": (Kept(16, first=8192, further=16, answer=2),),
}
LONGEST = 17 * 1024  # tokens that any of them comes to


def scaled(load: Any, scale: int) -> Any:
    lengths = ("message", "answer", "document", "first", "further")
    values = vars(load).items()
    return type(load)(**{k: -(-v // scale) if k in lengths else v for k, v in values})


def talk(client: Client, load: Talks, seed: int) -> tuple[Row, list[Turn]]:
    document = random.Random(f"document {seed}").choices(TOKENS, k=load.document)

    def one(name: Any) -> list[Turn]:
        conversation = Conversation(client, f"{seed} {load.at_once} {name}", list(document))
        return conversation.talk(load.turns, load.message, load.answer)

    # Two of one text: that they diverge after it shows what they share.
    for name in ("before", "and before") if document else ("before",):
        one(name)
    start = time.perf_counter()
    talks = at_once(load.at_once, one, range(load.conversations))
    seconds = time.perf_counter() - start
    turns = [turn for turns in talks for turn in turns]
    later = [turn["ttft_s"] for turn in turns if turn["turn"]]
    row = {
        "concurrency": load.at_once,
        "completed": len(turns),
        "seconds": round(seconds, 3),
        "mean_ttft_ms": 1000 * statistics.mean(turn["ttft_s"] for turn in turns),
        "hit_tokens": sum(turn["cached"] for turn in turns),
        "prompt_tokens": sum(turn["prompt"] for turn in turns),
    }
    return row | ({"later_ttft_ms": 1000 * statistics.mean(later)} if later else {}), turns


def keep(client: Client, load: Kept, seed: int) -> tuple[Row, list[Turn]]:
    """The most conversations that all find what they said before; an eighth more don't."""
    talks: list[Conversation] = []
    rounds: list[Turn] = []
    kept = 0
    while kept == len(talks) < load.most:
        new = [Conversation(client, f"{seed} {len(talks) + i}") for i in range(max(kept // 8, 1))]
        at_once(load.at_once, lambda talk: talk.turn(load.first, load.answer), new)
        talks += new
        said = [len(talk.text) for talk in talks]
        turns = at_once(load.at_once, lambda talk: talk.turn(load.further, load.answer), talks)
        hits = sum(t["cached"] >= KEPT * tokens for t, tokens in zip(turns, said, strict=True))
        kept = len(talks) if hits == len(talks) else kept
        rounds.append({"conversations": len(talks), "hits": hits})
    return {"concurrency": load.at_once, "conversations_kept": kept}, rounds


def measure(
    arm: Arm, workloads: list[str], engine: dict[str, Any], options: Namespace, deadline: float
) -> Iterator[Row]:
    """``engine``: the entry of this server in the run's record. Beside a row, a file of its turns
    is left in ``options.out``."""
    log = options.out / f"{engine['arm']}-turns.log"
    started = serving(arm, engine, options, log, deadline)

    def rows() -> Iterator[Row]:
        with started as server:
            yield {}
            client = Client(server.url, server.name, deadline)
            before: list[str] = []
            for name in (name for name in TALKS if name in workloads):
                for load in TALKS[name]:
                    load = scaled(load, options.scale)
                    preempted = server.preemptions()
                    run = talk if isinstance(load, Talks) else keep
                    row, turns = run(client, load, options.seed)
                    save(log.with_name(f"{log.stem}-{name}-{row['concurrency']}.json"), turns)
                    row |= {"preemptions": server.preemptions() - preempted}
                    yield {"workload": name, **row, "server_did_before": list(before)}
                before.append(name)

    return rows()


def save(path: Path, turns: list[Turn]) -> None:
    path.write_text(json.dumps(turns) + "\n")
