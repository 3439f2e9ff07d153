"""DMS on `/metrics`: vLLM's statistics of a KV connector, filled with those of the cache.

After each step vLLM takes `Changes.take` from the scheduler's connector and carries it to a front
end, where `DMSPromMetrics` observes it. Workers report nothing here, so that the figures are those
of an engine whatever its tensor parallelism. Of several front ends each sees some of the steps
only: counters travel as what a step added, and Prometheus adds up what the front ends counted.
"""

import math
from typing import Any, NamedTuple

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.v1.metrics.utils import create_metric_per_engine

from vllm_dms.config import DMSConfig
from vllm_dms.core.manager import DMSManager
from vllm_dms.core.stats import Stats
from vllm_dms.gates import CACHE_DTYPES


class Totals(NamedTuple):
    """What a scheduler counted since its start, and what it holds now. Tokens are means over the
    (layer, head) rows of all ranks."""

    evicted_tokens: float
    eligible_tokens: float
    returned_blocks: int
    preemptions: int
    ended_requests: int

    live_tokens: float
    dense_tokens: int
    held_blocks: int
    usable_blocks: int
    kept_states: int
    kept_blocks: int

    @classmethod
    def of(cls, stats: Stats, manager: DMSManager) -> "Totals":
        kept = manager.prefix.kept if manager.prefix is not None else None
        ledger, usable = manager.ledger, manager.num_usable_blocks
        owned = ledger.tenancy > 0
        live, dense = ledger.live.dot(owned), ledger.reported_end.dot(owned)
        return cls(
            evicted_tokens=stats.evicted_tokens,
            eligible_tokens=stats.eligible_tokens,
            returned_blocks=manager.returned_blocks,
            preemptions=stats.preemptions,
            ended_requests=manager.shortages.ended_requests,
            live_tokens=int(live) / ledger.all_rows,
            dense_tokens=int(dense),
            held_blocks=usable - manager.block_pool.get_num_free_blocks(),
            usable_blocks=usable,
            kept_states=len(kept) if kept is not None else 0,
            kept_blocks=kept.num_blocks if kept is not None else 0,
        )


PREFIX = "vllm:dms_"
COMPRESSION = "live_compression"
# By field of `Totals`, in their order; one gauge is made of two.
COUNTERS = {
    "evicted_tokens": "Tokens evicted when they left their window, mean over layers and KV heads.",
    "eligible_tokens": "Tokens that left their window, evicted or kept.",
    "returned_blocks": "KV blocks that requests gave back while they ran.",
    "preemptions": "Preemptions: a request gave up its blocks, to compute its tokens again.",
    "ended_requests": "Requests ended with an error because they could never fit.",
}
GAUGES = {
    "live_tokens": "Tokens held of all requests with blocks, mean over layers and KV heads.",
    "dense_tokens": "Tokens that they would hold if nothing were evicted.",
    "held_blocks": "KV blocks held by requests.",
    "usable_blocks": "KV blocks of the pool.",
    "kept_states": "States kept for requests that begin the same (prefix_cache).",
    "kept_blocks": "Free KV blocks that these are in.",
    COMPRESSION: "Dense tokens per live token; NaN while no request holds any.",
}
INFO = "info"
INFO_LABELS = ("kv_cache_dtype", "dialect", "window", "shift", "evict")


class DMSConnectorStats(KVConnectorStats):
    """``data``: what counters gained and what gauges show, by field of `Totals`.

    vLLM also writes what a connector's statistics reduce to into its log, as "KV Transfer
    metrics". Nothing is transferred, and DMS has a line of its own: the log's part stays empty.
    """

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> "DMSConnectorStats":
        return self

    def reduce(self) -> dict[str, int | float]:
        return {}


class Changes:
    """What became of a scheduler's totals since they were last taken."""

    def __init__(self, stats: Stats, manager: DMSManager) -> None:
        self._stats, self._manager = stats, manager
        self._taken = Totals.of(stats, manager)

    def take(self) -> DMSConnectorStats | None:
        before, now = self._taken, Totals.of(self._stats, self._manager)
        if now == before:
            return None
        self._taken = now
        data = now._asdict()
        for name, value in zip(COUNTERS, before, strict=False):  # the first fields
            # A counter that falls is an error, and a difference of means can round to below 0.
            data[name] = max(data[name] - value, 0)
        return DMSConnectorStats(data)


class DMSPromMetrics(KVConnectorPromMetrics):
    """The metrics of all engines of a front end. A gauge appears with the first step: what an
    engine holds is not known here before."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: create_metric_per_engine(
                self._counter_cls(
                    name=PREFIX + name, documentation=documentation, labelnames=labelnames
                ),
                per_engine_labelvalues,
            )
            for name, documentation in COUNTERS.items()
        }
        self._gauges = {
            name: self._gauge(name, documentation, labelnames)
            for name, documentation in GAUGES.items()
        }
        self._gauges_of: dict[int, dict[str, Any]] = {}  # by engine, once it made a step
        info = self._gauge(INFO, "How the cache is served; always 1.", [*labelnames, *INFO_LABELS])
        values = info_labelvalues(DMSConfig.from_dict(vllm_config.additional_config["dms"]))
        for labelvalues in per_engine_labelvalues.values():
            info.labels(*labelvalues, *values).set(1)

    def _gauge(self, name: str, documentation: str, labelnames: list[str]) -> Any:
        return self._gauge_cls(
            name=PREFIX + name,
            documentation=documentation,
            # Of several front ends, the one that saw the engine's last step.
            multiprocess_mode="mostrecent",
            labelnames=labelnames,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        data = transfer_stats_data
        for name, counters in self._counters.items():
            if data[name]:
                counters[engine_idx].inc(data[name])
        gauges = self._gauges_of.get(engine_idx)
        if gauges is None:
            values = self.per_engine_labelvalues[engine_idx]
            gauges = {name: gauge.labels(*values) for name, gauge in self._gauges.items()}
            self._gauges_of[engine_idx] = gauges
        live, dense = data["live_tokens"], data["dense_tokens"]
        gauges[COMPRESSION].set(dense / live if live else math.nan)
        for name in Totals._fields[len(COUNTERS) :]:
            gauges[name].set(data[name])


def info_labelvalues(config: DMSConfig) -> list[str]:
    flags = {storage: flag for flag, storage in CACHE_DTYPES.items()}
    values = (flags[config.storage], config.dialect, config.window, config.shift, config.evict)
    return [str(value).lower() for value in values]
