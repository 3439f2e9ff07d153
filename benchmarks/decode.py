"""Decode at set concurrencies and with a full pool, and how many requests fill it."""

import math
from collections.abc import Iterator

from driver import QUIET_STEPS, Driver, quiet_tail
from record import Row
from steps import Plan

PROBE_TOKENS = 4  # generated after a probe, so that its report arrives before its end


def decode_rows(driver: Driver, plan: Plan, pool_tokens: int) -> Iterator[Row]:
    """In an order in which each prepares the next. ``pool_tokens``: of a cache that keeps all"""
    kept = live(driver, plan)  # a warm-up, too
    if "decode-8k" in plan.workloads:
        for level in plan.levels:
            driver.admit(level, plan.prompt_len, plan.output_limit)
            row = {"workload": "decode-8k", "concurrency": level, "preemptions": 0}
            yield row | driver.run_quiet(plan.num_steps) | context(driver, plan) | kept
    if {"capacity-8k", "saturated-8k"} & set(plan.workloads):
        yield fill(driver, plan, pool_tokens, kept) | kept
    if "saturated-8k" in plan.workloads:
        yield saturated(driver, plan) | kept


def live(driver: Driver, plan: Plan) -> dict[str, float]:
    """What the plugin reports of prompts, of stock caches nothing."""
    for _ in range(3):
        driver.submit(1, plan.prompt_len, PROBE_TOKENS)
        driver.run_until(lambda: not driver.generated)
    if not driver.reports:
        return {}
    tokens = sum(report["live_tokens"] for report in driver.reports)
    dense = sum(report["dense_tokens"] for report in driver.reports)
    return {"live_compression": dense / tokens, "live_tokens": tokens / len(driver.reports)}


def context(driver: Driver, plan: Plan) -> Row:
    """Mean tokens of the requests that decode."""
    generated = [tokens for tokens in driver.generated.values() if tokens]
    return {"context": round(plan.prompt_len + sum(generated) / max(len(generated), 1), 1)}


def fill(driver: Driver, plan: Plan, pool_tokens: int, kept: dict[str, float]) -> Row:
    """Offer more than fits, and let the engine admit what it will."""
    expected = pool_tokens * kept.get("live_compression", 1.0) / plan.prompt_len
    offered = min(math.ceil(1.1 * expected) + 4, plan.max_requests)
    start = len(driver.steps)
    driver.submit(max(offered - len(driver.generated), 0), plan.prompt_len, plan.output_limit)

    def full() -> bool:
        settled = quiet_tail(driver.steps[start:]) >= QUIET_STEPS
        return settled and (driver.decoding() >= offered or driver.pool_is_full())

    driver.run_until(full)
    held = driver.steps[-1].running
    return {
        "workload": "capacity-8k",
        "concurrency": held,
        "requests_held": held,
        "preemptions": driver.preempted_since(start),
        "offered": offered,  # as many as held: the pool would take more
        "usage": driver.steps[-1].usage,
        **context(driver, plan),
    }


def saturated(driver: Driver, plan: Plan) -> Row:
    """After `fill`. Room is made for what the window generates, as if nothing were evicted: the
    same in all arms, so that none is measured while it preempts."""
    held, start = driver.steps[-1].running, len(driver.steps)
    room = math.ceil(held * (plan.num_steps + 2 * QUIET_STEPS) / plan.prompt_len)
    driver.abort(list(driver.generated)[max(held - room, 1) :])
    figures = driver.run_quiet(plan.num_steps) | context(driver, plan)
    row = {"workload": "saturated-8k", "concurrency": driver.steps[-1].running}
    return row | figures | {"requests_held": held, "preemptions": driver.preempted_since(start)}
