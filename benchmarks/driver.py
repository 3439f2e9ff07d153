"""Drives one vLLM engine step by step and keeps what each step did.

The engine runs as in production: its core in a process of its own, scheduling asynchronously. Times
are the core's own, one per step, so that nothing in this process is part of a measurement.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import median
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput

QUIET_STEPS = 8  # quiet steps after which the engine has admitted what it will


@dataclass(frozen=True)
class Step:
    time: float  # seconds, the engine core's monotonic clock
    tokens: int  # tokens generated in this step
    running: int  # requests in the scheduler's running list after it
    waiting: int
    usage: float  # share of the pool that is held
    resumed: int  # requests that came back in this step from a preemption


def window_of(steps: list[Step]) -> dict[str, float]:
    """Figures of steps in which the same requests all decoded and nothing else happened."""
    gaps = [1000 * (b.time - a.time) for a, b in pairwise(steps)]
    rate = 1000 * sum(step.tokens for step in steps[1:]) / sum(gaps)
    return {"decode_tok_s": rate, "step_ms": median(gaps), "step_ms_max": max(gaps)}


def quiet_tail(steps: list[Step]) -> int:
    """Length of the longest tail of ``steps`` in which every running request got one token, their
    number did not change, and none was preempted or resumed."""
    length = 0
    for step in reversed(steps):
        if step.tokens != step.running or step.tokens != steps[-1].tokens or step.resumed:
            break
        length += 1
    return length


class Driver:
    def __init__(self, engine: Any, vocab_size: int, seed: int) -> None:
        """``engine``: vLLM's LLMEngine"""
        self.engine, self.vocabulary, self.random = engine, range(vocab_size), Random(seed)
        self.tasks = engine.get_supported_tasks()
        self.generated: dict[str, int] = {}  # tokens, by request that has not ended
        self.reports: list[dict[str, Any]] = []  # the plugin's, of requests that have
        self.steps: list[Step] = []
        self.num_submitted = 0

    def submit(self, count: int, prompt_len: int, max_tokens: int) -> None:
        """Random prompts. Temperature 1: with random weights, greedy decoding repeats a token."""
        params = SamplingParams(
            temperature=1.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        processor = self.engine.input_processor
        for _ in range(count):
            self.num_submitted += 1
            prompt = {"prompt_token_ids": self.random.choices(self.vocabulary, k=prompt_len)}
            request = processor.process_inputs(str(self.num_submitted), prompt, params, self.tasks)
            processor.assign_request_id(request)
            self.generated[request.request_id] = 0
            self.engine.engine_core.add_request(request)

    def step(self) -> None:
        outputs = self.engine.engine_core.get_output()
        known = [out for out in outputs.outputs if out.request_id in self.generated]
        for out in known:  # the others were aborted while their step ran
            self._take(out)
        stats = outputs.scheduler_stats
        if stats is None and not outputs.outputs:
            return
        counts = (-1, -1, 0.0)
        if stats is not None:
            waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
            counts = (stats.num_running_reqs, waiting, stats.kv_cache_usage)
        events = [event.type.name for out in known for event in out.events or ()]
        tokens, resumed = sum(len(out.new_token_ids) for out in known), events.count("PREEMPTED")
        self.steps.append(Step(outputs.timestamp, tokens, *counts, resumed))

    def _take(self, out: EngineCoreOutput) -> None:
        self.generated[out.request_id] += len(out.new_token_ids)
        if out.finish_reason is None:
            return
        if str(out.finish_reason) == "error":
            raise RuntimeError(f"request {out.request_id} ended with an error")
        del self.generated[out.request_id]
        report = (out.kv_transfer_params or {}).get("dms")
        self.reports += [report] if report else []

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.step()

    def run_quiet(self, num_steps: int, settle: int = 4) -> dict[str, float]:
        """Step until ``num_steps`` in a row are quiet, after ``settle`` such steps."""
        start = len(self.steps)
        self.run_until(lambda: quiet_tail(self.steps[start:]) >= settle + num_steps + 1)
        return window_of(self.steps[-num_steps - 1 :])

    def admit(self, level: int, prompt_len: int, max_tokens: int) -> None:
        """Until ``level`` requests decode at once, those that already do among them."""
        self.submit(level - len(self.generated), prompt_len, max_tokens)
        self.run_until(lambda: self.decoding() == level or self.pool_is_full())
        if self.decoding() < level:
            raise RuntimeError(f"the pool does not hold {level} requests: raise --pool-gib")

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            del self.generated[request_id]
        self.engine.engine_core.abort_requests(request_ids)

    def decoding(self) -> int:
        return sum(tokens > 0 for tokens in self.generated.values())

    def pool_is_full(self) -> bool:
        return quiet_tail(self.steps) >= QUIET_STEPS and self.steps[-1].waiting > 0

    def preempted_since(self, step: int) -> int:
        """Those that did not come back count, too."""
        resumed = sum(s.resumed for s in self.steps[step:])
        return resumed + max(self.decoding() - self.steps[-1].running, 0)
