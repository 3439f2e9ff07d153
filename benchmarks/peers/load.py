"""What every peer is asked for, and what each says of itself. Runs in the peer's own process."""

import faulthandler
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch


@dataclass(frozen=True)
class Load:
    """``batch`` prompts at once, to the end."""

    model: str  # directory that synthetic.py made
    batch: int
    prompt: int  # tokens of every prompt
    tokens: int  # generated for each
    seed: int
    until: float  # then the parent ends it, in seconds as of `time.time`
    to: str  # JSON that the peer writes

    def prompts(self, vocab_size: int) -> list[list[int]]:
        random = Random(self.seed)
        return [random.choices(range(vocab_size), k=self.prompt) for _ in range(self.batch)]


def run(package: str, measure: Callable[[Load], dict[str, Any]]) -> None:
    """Main function of a peer. ``measure`` returns ``seconds`` and what else is to be said."""
    load = Load(**json.loads(sys.argv[1]))
    # Shortly before the parent would end it without a word of what it was at.
    faulthandler.dump_traceback_later(max(load.until - time.time() - 3, 0.1), exit=True)
    row = {"version": version(package), "torch": torch.__version__, **measure(load)}
    row["tok_s"] = load.batch * load.tokens / row["seconds"]
    if torch.cuda.is_available():
        row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    Path(load.to).write_text(json.dumps(row))


def timed(generate: Callable[[int], None], tokens: int, first: int = 4) -> float:
    """Seconds of ``generate(tokens)``, after one of ``first``, in which kernels are compiled."""
    start = time.perf_counter()
    generate(first)
    synchronize()
    print(f"the first generation took {time.perf_counter() - start:.1f} s", flush=True)
    start = time.perf_counter()
    generate(tokens)
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
