"""Drives one vLLM engine step by step and keeps what each step did.

The engine runs as in production: its core in a process of its own, scheduling asynchronously. Times
are the core's own, one per step, so that nothing in this process is part of a measurement.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput
from vllm.v1.engine.llm_engine import LLMEngine


class OutOfTimeError(Exception):
    """The arm's time is up."""


@dataclass(frozen=True)
class Step:
    time: float  # seconds, the engine core's monotonic clock
    tokens: int  # tokens generated in this step
    running: int  # requests in the scheduler's running list after it
    waiting: int
    usage: float  # share of the pool that is held
    preemptions: int  # requests resumed in this step after a preemption


@dataclass
class Request:
    """What is known here of one request; times as in Step."""

    prompt_len: int
    generated: int = 0
    scheduled: float | None = None
    first_token: float | None = None
    dms: dict[str, Any] | None = None  # the plugin's report at the end
    finished: bool = False


@dataclass(frozen=True)
class Window:
    """A stretch of steps in which the same requests all decoded and nothing else happened."""

    seconds: float
    tokens: int
    step_ms: float  # median
    step_ms_max: float
    usage: float

    @classmethod
    def of(cls, steps: list[Step]) -> "Window":
        gaps = [1000 * (b.time - a.time) for a, b in pairwise(steps)]
        return cls(
            seconds=steps[-1].time - steps[0].time,
            tokens=sum(step.tokens for step in steps[1:]),
            step_ms=median(gaps),
            step_ms_max=max(gaps),
            usage=steps[-1].usage,
        )

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def quiet_tail(steps: list[Step]) -> int:
    """Length of the longest tail of ``steps`` in which every running request got one token, their
    number did not change, and none was preempted or resumed."""
    length = 0
    for step in reversed(steps):
        if step.tokens != step.running or step.tokens != steps[-1].tokens or step.preemptions:
            break
        length += 1
    return length


@dataclass
class Driver:
    engine: LLMEngine
    vocab_size: int
    seed: int
    deadline: float  # time.monotonic()
    active: dict[str, Request] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.tasks = self.engine.get_supported_tasks()
        self.num_submitted = 0

    def submit(self, count: int, prompt_len: int, max_tokens: int) -> list[Request]:
        """Random prompts. Temperature 1: with random weights, greedy decoding repeats a token."""
        requests = []
        for _ in range(count):
            self.num_submitted += 1
            params = SamplingParams(
                temperature=1.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
            )
            prompt = self.random.choices(range(self.vocab_size), k=prompt_len)
            processor = self.engine.input_processor
            core_request = processor.process_inputs(
                str(self.num_submitted), {"prompt_token_ids": prompt}, params, self.tasks
            )
            processor.assign_request_id(core_request)
            request = self.active[core_request.request_id] = Request(prompt_len)
            self.engine.engine_core.add_request(core_request)
            requests.append(request)
        return requests

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def step(self) -> Step:
        if self.seconds_left() < 0:
            raise OutOfTimeError
        outputs = self.engine.engine_core.get_output()
        results = [self._take(out, outputs.timestamp) for out in outputs.outputs]
        stats = outputs.scheduler_stats
        step = Step(
            time=outputs.timestamp,
            tokens=sum(tokens for tokens, _ in results),
            running=stats.num_running_reqs if stats else -1,
            waiting=stats.num_waiting_reqs + stats.num_skipped_waiting_reqs if stats else -1,
            usage=stats.kv_cache_usage if stats else 0.0,
            preemptions=sum(preemptions for _, preemptions in results),
        )
        if stats is not None or outputs.outputs:
            self.steps.append(step)
        return step

    def _take(self, out: EngineCoreOutput, now: float) -> tuple[int, int]:
        """-> tokens, preemptions"""
        request = self.active.get(out.request_id)
        if request is None:
            return 0, 0  # aborted while its step ran
        preemptions = 0
        for event in out.events or ():
            if event.type == EngineCoreEventType.SCHEDULED and request.scheduled is None:
                request.scheduled = event.timestamp
            preemptions += event.type == EngineCoreEventType.PREEMPTED
        if out.new_token_ids and request.first_token is None:
            request.first_token = now
        request.generated += len(out.new_token_ids)
        if out.finish_reason is not None:
            if str(out.finish_reason) == "error":
                raise RuntimeError(f"request {out.request_id} ended with an error; see the log")
            request.dms = (out.kv_transfer_params or {}).get("dms")
            request.finished = True
            del self.active[out.request_id]
        return len(out.new_token_ids), preemptions

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.step()

    def run_to_end(self) -> None:
        self.run_until(lambda: not self.active)

    def run_quiet(self, num_steps: int, settle: int = 4) -> Window:
        """Step until ``num_steps`` in a row are quiet, after ``settle`` such steps."""
        start = len(self.steps)
        self.run_until(lambda: quiet_tail(self.steps[start:]) >= settle + num_steps + 1)
        return Window.of(self.steps[-num_steps - 1 :])

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            del self.active[request_id]
        self.engine.engine_core.abort_requests(request_ids)

    def decoding(self) -> list[str]:
        return [i for i, request in self.active.items() if request.first_token is not None]

    def preempted_now(self) -> int:
        """Requests that were preempted and did not come back, by the last step."""
        return max(len(self.decoding()) - self.steps[-1].running, 0)

    def context(self) -> float:
        """Mean tokens of the requests that decode."""
        lengths = [r.prompt_len + r.generated for r in self.active.values() if r.generated]
        return sum(lengths) / max(len(lengths), 1)
