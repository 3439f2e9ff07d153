"""The workloads, each a few lines over `serving_driver.Driver`; every one yields rows."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from serving_driver import Driver, OutOfTimeError, Request, Step, Window, quiet_tail
from serving_plan import FIGURES, PREFILL_UNITS, QUIET_STEPS, Plan

PREFILL_REPEATS = {"prefill-8k": 8, "prefill-32k": 3, "prefill-128k": 1}
PROBE_TOKENS = 4  # generated after a measured prompt, so that its report arrives before its end
MEASURING_SECONDS = 30.0  # kept back for what comes after the pool was filled


@dataclass
class Bench:
    """The workloads of a plan, in an order in which each prepares the next."""

    driver: Driver
    plan: Plan
    pool_tokens: int  # tokens that the pool holds if all are kept
    live_compression: float | None = None  # of 8k prompts, measured; None: a dense cache
    live_tokens: float | None = None

    def run(self) -> Iterator[dict[str, Any]]:
        wanted = self.plan.workloads
        if {"decode-8k", "saturated-8k", "capacity-8k", "prefill-8k"} & set(wanted):
            # Also a warm-up, and the measurement of how much is kept at 8k.
            row = self.prefill("prefill-8k")
            if "prefill-8k" in wanted:
                yield row
        if "decode-8k" in wanted:
            for level in self.plan.levels:
                if self.admit(level):
                    yield self.decode()
        if {"saturated-8k", "capacity-8k"} & set(wanted):
            yield from self.saturate()
        self.driver.abort(list(self.driver.active))
        for workload in ("prefill-32k", "prefill-128k"):
            if workload in wanted:
                yield self.prefill(workload)
        if "reason-1k-8k" in wanted:
            yield self.reason()

    def row(self, workload: str, **figures: Any) -> dict[str, Any]:
        return {
            "workload": workload,
            **dict.fromkeys(FIGURES),
            "live_compression": self.live_compression,
            "live_tokens": self.live_tokens,
            **figures,
        }

    def prefill(self, workload: str) -> dict[str, Any]:
        """One prompt at a time, from when it is scheduled to its first token; after a warm-up."""
        length = PREFILL_UNITS[workload] * self.plan.unit
        warm_up = min(length, 2 * self.plan.chunk)
        self.driver.submit(1, warm_up, PROBE_TOKENS)
        self.driver.run_to_end()
        requests, seconds = [], []
        for _ in range(PREFILL_REPEATS[workload]):
            requests += self.driver.submit(1, length, PROBE_TOKENS)
            self.driver.run_to_end()
            scheduled, first_token = requests[-1].scheduled, requests[-1].first_token
            assert scheduled is not None and first_token is not None
            seconds.append(first_token - scheduled)
        compression, live = live_of(requests)
        if workload == "prefill-8k":
            self.live_compression, self.live_tokens = compression, live
        return self.row(
            workload,
            concurrency=1,
            prefill_tok_s=length * len(seconds) / sum(seconds),
            seconds=[round(s, 4) for s in seconds],
            context=length,
            live_compression=compression,
            live_tokens=live,
        )

    def admit(self, level: int) -> bool:
        """Until ``level`` requests decode at once, those of the level before among them; False if
        the pool does not hold so many."""
        driver = self.driver
        driver.submit(level - len(driver.active), 8 * self.plan.unit, self.plan.output_limit)
        driver.run_until(lambda: len(driver.decoding()) == level or self.pool_is_full())
        if len(driver.decoding()) == level:
            return True
        driver.abort([i for i, request in driver.active.items() if not request.generated])
        return False

    def pool_is_full(self) -> bool:
        steps = self.driver.steps
        return bool(steps) and steps[-1].waiting > 0 and quiet_tail(steps) >= QUIET_STEPS

    def decode(self) -> dict[str, Any]:
        """The admitted requests decode, and nothing else happens."""
        window = self.driver.run_quiet(self.plan.window_steps)
        return self.row(
            "decode-8k",
            concurrency=len(self.driver.active),
            decode_tok_s=window.rate,
            preemptions=0,
            **self.details(window),
        )

    def details(self, window: Window) -> dict[str, Any]:
        return {"context": round(self.driver.context(), 1), "window": asdict(window)}

    def saturate(self) -> Iterator[dict[str, Any]]:
        """Offer more than fits, let the engine admit what it will, then measure."""
        driver, plan = self.driver, self.plan
        expected = self.pool_tokens * (self.live_compression or 1.0) / (8 * plan.unit)
        offered = min(math.ceil(1.1 * expected) + 4, plan.max_requests)
        start = len(driver.steps)
        driver.submit(max(offered - len(driver.active), 0), 8 * plan.unit, plan.output_limit)
        complete = self.fill(offered)
        held = driver.steps[-1].running
        preemptions = sum(s.preemptions for s in driver.steps[start:]) + driver.preempted_now()
        yield self.row(
            "capacity-8k",
            concurrency=held,
            requests_held=held,
            preemptions=preemptions,
            context=round(driver.context(), 1),
            offered=offered,  # as many as held: the pool would take more
            usage=driver.steps[-1].usage,
            complete=complete,
        )
        if "saturated-8k" in plan.workloads:
            yield self.saturated(held, preemptions) | {"complete": complete}

    def fill(self, offered: int) -> bool:
        """Until the engine has admitted what it will. False: the time ran short before that, so the
        rest is taken back and what was admitted goes on to be measured."""
        driver, start = self.driver, len(self.driver.steps)

        def full() -> bool:
            settled = quiet_tail(driver.steps[start:]) >= QUIET_STEPS
            return settled and (len(driver.decoding()) >= offered or self.pool_is_full())

        def late() -> bool:
            return driver.seconds_left() < MEASURING_SECONDS and bool(driver.decoding())

        driver.run_until(lambda: full() or late())
        if full():
            return True
        driver.abort([i for i, request in driver.active.items() if not request.generated])
        driver.run_quiet(QUIET_STEPS)
        return False

    def saturated(self, held: int, preemptions: int) -> dict[str, Any]:
        """Make room for what the window generates, as if nothing were evicted: the same in all
        arms, so that none is measured while it preempts."""
        driver, plan = self.driver, self.plan
        room = math.ceil(held * (plan.window_steps + 2 * QUIET_STEPS) / (8 * plan.unit))
        keep = max(held - room, 1)
        driver.abort(list(driver.active)[keep:])
        start = len(driver.steps)
        window = driver.run_quiet(plan.window_steps)
        preemptions += sum(s.preemptions for s in driver.steps[start:]) + driver.preempted_now()
        return self.row(
            "saturated-8k",
            concurrency=driver.steps[-1].running,
            decode_tok_s=window.rate,
            requests_held=held,
            preemptions=preemptions,
            **self.details(window),
        )

    def reason(self) -> dict[str, Any]:
        """All requests at once, to the end; or as far as time allows, and the row says so."""
        driver, plan = self.driver, self.plan
        start = len(driver.steps)
        requests = driver.submit(plan.reason_requests, plan.unit, 8 * plan.unit)
        complete = True
        try:
            driver.run_to_end()
        except OutOfTimeError:
            if not any(r.generated for r in requests):
                raise
            complete = False
        steps = driver.steps[start:]
        begin = min(r.scheduled for r in requests if r.scheduled is not None)
        generated = sum(r.generated for r in requests)
        compression, live = live_of([r for r in requests if r.finished])
        return self.row(
            "reason-1k-8k",
            concurrency=plan.reason_requests,
            decode_tok_s=generated / (steps[-1].time - begin),
            requests_held=held_when_full(steps, plan.reason_requests),
            mean_running=round(mean_running(steps), 1),
            preemptions=sum(s.preemptions for s in steps) + driver.preempted_now(),
            live_compression=compression,
            live_tokens=live,
            complete=complete,
            finished=sum(r.finished for r in requests),
            generated=generated,
            seconds=round(steps[-1].time - begin, 2),
        )


def held_when_full(steps: list[Step], count: int) -> int:
    """Fewest of the ``count`` requests that ran while others waited, from when most ran to the
    first end of one: what the pool holds of the longest contexts. If none waited, all that ran."""
    most = max(step.running for step in steps)
    peak = next(i for i, step in enumerate(steps) if step.running == most)
    full = [s.running for s in steps[peak:] if s.waiting and s.running + s.waiting == count]
    return min(full, default=most)


def mean_running(steps: list[Step]) -> float:
    """Over time, not over steps."""
    area = sum(a.running * (b.time - a.time) for a, b in pairwise(steps))
    return area / (steps[-1].time - steps[0].time)


def live_of(requests: list[Request]) -> tuple[float | None, float | None]:
    """(dense tokens over live tokens, live tokens of a request) from the plugin's reports."""
    reports = [r.dms for r in requests if r.dms]
    if not reports:
        return None, None
    live = sum(r["live_tokens"] for r in reports)
    return sum(r["dense_tokens"] for r in reports) / live, live / len(reports)


def measure(driver: Driver, plan: dict[str, Any], facts: dict[str, Any]) -> Iterator[dict]:
    """What `serving_process` runs; ``facts`` are the engine's."""
    yield from Bench(driver, Plan(**plan), facts["pool_tokens"]).run()
