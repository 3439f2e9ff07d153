"""DMS on `/metrics`: what an engine's scheduler knows, through vLLM's own messages and loggers."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import random_tokens
from core_sim import make_config, make_engine
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_dms.connector import DMSConnector
from vllm_dms.core.metrics import COUNTERS, GAUGES, PREFIX, Changes, Totals
from vllm_dms.reference import ReferenceModel

DASHBOARD = Path(__file__).parents[1] / "examples" / "grafana" / "dms.json"
PAYLOAD = {
    **{"evicted_tokens": 6.5, "eligible_tokens": 8, "returned_blocks": 3},
    **{"preemptions": 2, "ended_requests": 1},
    **{"live_tokens": 12.5, "dense_tokens": 100, "held_blocks": 4, "usable_blocks": 9},
    **{"kept_states": 2, "kept_blocks": 5},
}


def payloads_of(engine) -> list[dict]:
    """Filled, from now on, with what each step sends to the front end, after the trip there."""
    payloads, update = [], engine.scheduler.update_from_output
    encoder, decoder = MsgpackEncoder(), MsgpackDecoder(EngineCoreOutputs)

    def recording_update(*args):
        outputs = update(*args)
        for output in outputs.values():
            stats = decoder.decode(encoder.encode(output)).scheduler_stats
            if stats is not None and stats.kv_connector_stats is not None:
                payloads.append(stats.kv_connector_stats)
        return outputs

    engine.scheduler.update_from_output = recording_update
    return payloads


def total(payloads, name):
    return sum(payload[name] for payload in payloads)


class Seen:
    """What the workers of a simulated engine hold, and what became of past-window tokens."""

    def __init__(self, engine):
        self.engine = engine
        self.past = {}  # (state index, its tenant) -> past-window tokens, those evicted

    def look(self) -> dict[str, float]:
        workers, layout = self.engine.workers, self.engine.spec.layout
        live = dense = 0
        for owner in self.engine._held():
            state = owner[0]
            tokens = int(workers[0].tokens[state])
            mean = sum(w.live[state].mean() for w in workers) / len(workers)
            past = max(tokens - layout.ring_size, 0)
            self.past[owner] = past, past - (mean - min(tokens, layout.ring_size))
            live, dense = live + mean, dense + tokens
        held = sum(len(b) for b in self.engine.manager.req_to_blocks.values())
        return {"live_tokens": live, "dense_tokens": dense, "held_blocks": held}


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_reaches_the_front_end_is_what_the_workers_hold(ranks):
    engine = make_engine(1.0, ranks=ranks)  # 16 blocks
    payloads, seen = payloads_of(engine), Seen(engine)
    for i, keep in enumerate((0.0, 0.2, 1.0, 1.0)):
        engine.add(f"r{i}", 60, 120, keep=keep)
    while engine.scheduler.has_unfinished_requests():
        engine.step()
        for name, value in seen.look().items():
            assert payloads[-1][name] == pytest.approx(value), name
    eligible, evicted = (sum(column) for column in zip(*seen.past.values(), strict=True))
    assert total(payloads, "eligible_tokens") == eligible > 0
    assert total(payloads, "evicted_tokens") == pytest.approx(evicted) and evicted > 0
    assert total(payloads, "preemptions") == engine.num_preemptions > 0
    assert total(payloads, "returned_blocks") == engine.manager.returned_blocks > 0
    assert total(payloads, "ended_requests") == 0
    assert payloads[-1]["live_tokens"] == payloads[-1]["dense_tokens"] == 0
    assert payloads[-1]["held_blocks"] == 0 and payloads[-1]["usable_blocks"] == 16


def test_a_request_that_can_never_fit_is_counted_once():
    engine = make_engine(4.0)  # 7 blocks; a dense request would need 16
    payloads = payloads_of(engine)
    engine.add("dense", 180, 20, keep=1.0)
    engine.add("small", 10, 40, keep=0.0)
    engine.drain()
    assert engine.finished == {"dense": "error", "small": "length"}
    assert total(payloads, "ended_requests") == 1


def test_counters_and_gauges_are_the_totals_in_their_order():
    assert Totals._fields == (*COUNTERS, *GAUGES)[:-1]


def test_a_step_that_changes_nothing_sends_nothing():
    engine = make_engine()
    engine.add("r", 20, 5, keep=0.0)
    engine.drain()
    assert engine.connector.get_kv_connector_stats() is None


def test_a_counter_never_falls_by_rounding(monkeypatch):
    engine = make_engine()
    stats = SimpleNamespace(evicted_tokens=0.3, eligible_tokens=1, preemptions=0)
    changes = Changes(stats, engine.manager)
    stats.evicted_tokens, stats.eligible_tokens = 0.3 - 1e-16, 2
    data = changes.take().to_dict()
    assert data["evicted_tokens"] == 0 and data["eligible_tokens"] == 1


def test_workers_report_nothing_of_their_own():
    """vLLM would add their figures, one more for each rank, to the scheduler's."""
    vllm_config, _ = make_config()
    cache = KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[])
    worker = DMSConnector(vllm_config, KVConnectorRole.WORKER, cache)
    assert worker.get_kv_connector_stats() is None


def test_vllms_own_log_line_on_kv_transfer_stays_out():
    vllm_config, _ = make_config()
    lines = []
    log = KVConnectorLogging(vllm_config.kv_transfer_config)
    for _ in range(3):
        log.observe(PAYLOAD)
        log.log(log_fn=lambda *args: lines.append(args))
    assert lines == []


# The front end.


@pytest.fixture
def front_end():
    """vLLM's own metrics of a front end of two engines, which share a model."""
    vllm_config, _ = make_config()
    yield PrometheusStatLogger(vllm_config, [0, 1])
    unregister_vllm_metrics()


def value_of(name, engine="0", **labels) -> float | None:
    """None: no such sample."""
    found = [
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == name and sample.labels.items() >= {"engine": engine, **labels}.items()
    ]
    return found[0] if found else None


def test_each_engine_has_its_own_counters_and_gauges(front_end):
    for engine, payload in ((1, PAYLOAD), (1, PAYLOAD), (0, PAYLOAD | {"held_blocks": 7})):
        stats = SchedulerStats(kv_connector_stats=payload)
        front_end.record(stats, None, engine_idx=engine)
    for name in COUNTERS:
        assert value_of(f"{PREFIX}{name}_total", "0") == PAYLOAD[name]
        assert value_of(f"{PREFIX}{name}_total", "1") == 2 * PAYLOAD[name]
    for name in GAUGES.keys() & PAYLOAD.keys():
        assert value_of(PREFIX + name, "1") == PAYLOAD[name]
    assert value_of(PREFIX + "held_blocks", "0") == 7
    assert value_of(PREFIX + "live_compression", "1") == 8


def test_compression_has_no_value_while_nothing_is_held(front_end):
    payload = PAYLOAD | {"live_tokens": 0, "dense_tokens": 0}
    front_end.record(SchedulerStats(kv_connector_stats=payload), None, engine_idx=0)
    assert math.isnan(value_of(PREFIX + "live_compression"))


def test_before_the_first_step_counters_are_zero_and_gauges_are_not_made_up(front_end):
    labels = {"kv_cache_dtype": "dms", "dialect": "nvidia-borrowed", "window": "15", "shift": "1"}
    assert value_of(PREFIX + "info", "1", **labels, evict="true") == 1
    assert value_of(PREFIX + "evicted_tokens_total") == 0
    assert value_of(PREFIX + "usable_blocks") is None


def test_every_metric_of_the_dashboard_exists(front_end):
    front_end.record(SchedulerStats(kv_connector_stats=PAYLOAD), None)
    exposed = {sample.name for metric in REGISTRY.collect() for sample in metric.samples}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [t["expr"] for p in dashboard["panels"] for t in p.get("targets", ())]
    expressions += [v["definition"] for v in dashboard["templating"]["list"] if "definition" in v]
    shown = set(re.findall(r"vllm:\w+", " ".join(expressions)))
    assert shown <= exposed
    # prometheus_client adds when a counter was made.
    ours = {n for n in exposed if n.startswith(PREFIX) and not n.endswith("_created")}
    assert ours <= shown
    page = (DASHBOARD.parents[2] / "docs" / "metrics.md").read_text()
    assert set(re.findall(r"vllm:dms_\w+", page)) == ours


# A whole engine.


@pytest.fixture
def llm(checkpoint, make_engine):
    return make_engine(
        checkpoint("nvidia-borrowed"),
        dtype="float32",
        kv_cache_dtype="dms",
        max_num_batched_tokens=96,
        max_num_seqs=8,
        disable_log_stats=False,
    )


def answers(llm, lengths, **params):
    params = SamplingParams(ignore_eos=True, detokenize=False, **params)
    token_ids = [random_tokens(n, seed=n) for n in lengths]
    inputs = [{"prompt_token_ids": ids} for ids in token_ids]
    return token_ids, llm.generate(inputs, params, use_tqdm=False)


def test_a_whole_engines_metrics_are_the_references_evictions(checkpoint, llm):
    reference = ReferenceModel.from_dir(checkpoint("nvidia-borrowed"))
    assert value_of(PREFIX + "usable_blocks") is None, "the engine ran before"
    eligible, evicted, slack = 0, 0.0, 0
    for prompt, output in zip(*answers(llm, (20, 230, 512), max_tokens=24), strict=True):
        num_tokens = output.kv_transfer_params["dms"]["dense_tokens"]
        past = max(num_tokens - (reference.dms.window + 1), 0)
        ids = (prompt + list(output.outputs[0].token_ids))[:num_tokens]
        eligible += past
        evicted += reference.forward(ids).evict[..., :past].float().sum(-1).mean().item()
        slack += 4  # the last steps' reports can come when the request is gone
    assert eligible - slack <= value_of(PREFIX + "eligible_tokens_total") <= eligible
    counted = value_of(PREFIX + "evicted_tokens_total")
    assert evicted - slack <= counted <= evicted + 0.01 and evicted > 10 * slack
    figures = {metric.name: metric.value for metric in llm.get_metrics() if "dms" in metric.name}
    assert figures[PREFIX + "evicted_tokens"] == int(counted)
    assert figures[PREFIX + "held_blocks"] == figures[PREFIX + "live_tokens"] == 0
    assert figures[PREFIX + "usable_blocks"] > 0


def test_of_several_answers_to_a_prompt_the_last_to_finish_gives_the_figures(llm):
    stop = {"max_tokens": 60, "stop_token_ids": list(range(24))}
    torch.manual_seed(0)
    (prompt,), (output,) = answers(llm, (10,), n=8, **stop)  # all start in one step
    lengths = [len(o.token_ids) for o in output.outputs]
    assert lengths[0] < max(lengths) - 5, "the stop tokens are to set them apart"
    last = output.kv_transfer_params["dms"]["dense_tokens"] - len(prompt)
    assert max(lengths) - 5 < last <= max(lengths)
