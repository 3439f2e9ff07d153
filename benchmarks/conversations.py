"""Clients of a server's completions: conversations of random tokens, several at once."""

import json
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.request import Request, urlopen

from processes import RunError

TOKENS = range(100, 400)
Turn = dict[str, Any]


@dataclass(frozen=True)
class Client:
    """Of a server at ``url`` that calls its model ``model``; nothing is asked after ``deadline``
    (of the monotonic clock)."""

    url: str
    model: str
    deadline: float

    def ask(self, prompt: list[int], answer: int, ids: bool = True) -> Turn:
        """An answer of so many tokens: when the first came, what the cache had of the prompt, in
        tokens, and with ``ids`` what it says."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise RunError("out of time")
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": answer, "stream": True,
            "ignore_eos": True, "temperature": 1.0, "return_token_ids": ids,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        data = json.dumps(body).encode()
        start, first, said, usage = time.perf_counter(), 0.0, [], {}
        request = Request(f"{self.url}/v1/completions", data, headers)
        with urlopen(request, timeout=left) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                now = time.perf_counter()
                event = json.loads(line.removeprefix(b"data: "))
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    first = first or now - start
                    said += choice.get("token_ids") or ()
        if usage.get("completion_tokens") != answer or (ids and len(said) != answer):
            raise RunError(f"of an answer of {answer} tokens {len(said)} came, usage {usage}")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        turn = {"ttft_s": first, "cached": cached, "prompt": len(prompt)}
        return turn | ({"said": said} if ids else {})


@dataclass
class Conversation:
    """Random messages; each turn's prompt is all that was said before, and the next message."""

    client: Client
    seed: str
    text: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def turn(self, message: int, answer: int, last: bool = False) -> Turn:
        """``last``: what the answer says is of no interest"""
        self.text += self.random.choices(TOKENS, k=message)
        turn = self.client.ask(self.text, answer, ids=not last)
        self.text += turn.pop("said", ())
        self.turns.append(turn | {"turn": len(self.turns)})
        return self.turns[-1]

    def talk(self, num_turns: int, message: int, answer: int) -> list[Turn]:
        for i in range(num_turns):
            self.turn(message, answer, last=i == num_turns - 1)
        return self.turns


def at_once(count: int, call: Any, items: Iterable[Any]) -> list[Any]:
    """``call`` of each item, ``count`` of them at a time; the first error ends all."""
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True, wait=False)
            raise
