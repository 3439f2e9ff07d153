"""Host time that DMS adds to a decode step in the scheduler, against stock vLLM's.

vLLM's own scheduler runs N requests in steady decode, once over `FullAttentionManager`, once over
`DMSManager` with its connector; the worker is a few array operations outside of the clock. CPU
time of the thread, so that what else the machine does is left out.
"""

import gc
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_dms import plugin
from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.messages import DMSReport
from vllm_dms.arena.report import REPORT_HORIZON
from vllm_dms.arena.spec import make_spec
from vllm_dms.arena.storage import ModelStorage
from vllm_dms.config import DMSConfig

PROMPT, CHUNK, MAX_MODEL_LEN = 4096, 1 << 21, 8192
# Qwen3-8B: its window and shape, BF16.
LAYOUT = ArenaLayout(
    num_layers=36,
    num_kv_heads=8,
    head_dim=128,
    window=512,
    page_size=64,
    block_size=16,
    storage=ModelStorage(torch.bfloat16),
    max_model_len=MAX_MODEL_LEN,
)
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}


def make_scheduler(model_dir: str, num_running: int, dms: bool) -> Scheduler:
    config = DMSConfig(
        dialect="nvidia-borrowed", window=512, alpha_scale=100.0, alpha_offset=5.0, shift=1
    )
    connector = KVTransferConfig(
        kv_connector="DMSConnector",
        kv_connector_module_path="vllm_dms.connector",
        kv_role="kv_producer",
    )
    vllm_config = VllmConfig(
        model_config=ModelConfig(
            model=model_dir, skip_tokenizer_init=True, max_model_len=MAX_MODEL_LEN
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=num_running,
            max_num_batched_tokens=CHUNK,
            max_model_len=MAX_MODEL_LEN,
            is_encoder_decoder=False,
            async_scheduling=False,
        ),
        cache_config=CacheConfig(block_size=LAYOUT.block_size, enable_prefix_caching=False),
        kv_transfer_config=connector if dms else None,
    )
    vllm_config.additional_config = {"dms": config.to_dict()} if dms else {}
    if dms:
        spec = make_spec(vllm_config, config, LAYOUT)
    else:
        spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    num_blocks = num_running * MAX_MODEL_LEN // LAYOUT.block_size + 1
    vllm_config.cache_config.num_gpu_blocks = num_blocks
    return Scheduler(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=LAYOUT.block_size,
        log_stats=True,
    )


class Worker:
    """Live slots of all rows; 1 of ``compression`` tokens that leave the window is kept."""

    def __init__(self, num_running: int, compression: float) -> None:
        self.rng = np.random.default_rng(0)
        self.live = np.zeros((num_running + 1, LAYOUT.num_rows), dtype=np.int32)
        self.keep = 1 / compression

    def report(self, meta, prompt: bool) -> DMSReport:
        states = meta.states
        if prompt:
            leaving = PROMPT - LAYOUT.ring_size
            kept = self.rng.binomial(leaving, self.keep, (len(states), LAYOUT.num_rows))
            self.live[states] = LAYOUT.ring_size + kept
        else:
            self.live[states] += self.rng.random((len(states), LAYOUT.num_rows)) < self.keep
        size = LAYOUT.page_size
        pages = [-(-(self.live + k) // size) for k in range(REPORT_HORIZON + 1)]
        pages = np.stack(pages, 1).sum(2, dtype=np.int32)
        pages[:, 1:] -= pages[:, :1]
        live = self.live.sum(1, dtype=np.int32)[:, None]
        report = torch.from_numpy(np.concatenate((pages, live), 1))
        return DMSReport(meta.step_id, meta.states.astype(np.int64), report)


class Run:
    """One scheduler with ``num_running`` requests, stepped by hand."""

    def __init__(self, model_dir: str, num_running: int, dms: bool, compression: float) -> None:
        self.scheduler = make_scheduler(model_dir, num_running, dms)
        self.worker = Worker(num_running, compression) if dms else None
        self.num_running = num_running
        self.times_us: dict[str, list[float]] = {"schedule": [], "update": []}
        for i in range(num_running):
            params = SamplingParams(max_tokens=MAX_MODEL_LEN - PROMPT, ignore_eos=True)
            self.scheduler.add_request(Request(f"request-{i}", [1] * PROMPT, params, None))

    def step(self, first: bool) -> None:
        start = time.thread_time()
        output = self.scheduler.schedule()
        scheduled = time.thread_time()
        assert len(output.num_scheduled_tokens) == self.num_running
        reply = None
        if self.worker:
            report = self.worker.report(output.kv_connector_metadata, first)
            reply = KVConnectorOutput(kv_connector_worker_meta=report)
        ids = list(output.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={r: i for i, r in enumerate(ids)},
            sampled_token_ids=[[1] for _ in ids],
            kv_connector_output=reply,
        )
        ran = time.thread_time()
        self.scheduler.update_from_output(output, result)
        updated = time.thread_time()
        self.times_us["schedule"].append((scheduled - start) * 1e6)
        self.times_us["update"].append((updated - ran) * 1e6)

    def result(self, skip: int) -> dict:
        """Medians; the mean of the two halves' sum shows what the rarer steps cost."""
        schedule, update = (np.array(t[skip:]) for t in self.times_us.values())
        return {
            "schedule_us": round(statistics.median(schedule), 1),
            "update_us": round(statistics.median(update), 1),
            "mean_us": round(float((schedule + update).mean()), 1),
        }

    def blocks(self) -> dict:
        manager = self.scheduler.connector._manager
        held = manager.num_usable_blocks - manager.block_pool.get_num_free_blocks()
        live = int(self.worker.live[1:].sum()) * LAYOUT.slot_bytes / LAYOUT.block_bytes
        return {
            "held_per_request": round(held / self.num_running, 2),
            "of_live_bytes_per_request": round(live / self.num_running, 2),
            "returned": manager.returned_blocks,
        }


def measure(model_dir: str, num_running: int, steps: int, compression: float) -> dict:
    """Both take turns step by step, so that a busy machine slows them alike."""
    stock, dms = (Run(model_dir, num_running, on, compression) for on in (False, True))
    gc.collect()
    gc.freeze()
    for step in range(steps):
        stock.step(step == 0)
        dms.step(step == 0)
    results = stock.result(skip=5), dms.result(skip=5)
    added = {k: round(results[1][k] - results[0][k], 1) for k in results[0]}
    return {
        "running": num_running,
        "added": added,
        "stock": results[0],
        "dms": results[1],
        "blocks": dms.blocks(),
    }


def measure_all(running: list[int], steps: int, compression: float) -> list[dict]:
    plugin.register()
    with tempfile.TemporaryDirectory() as model_dir:
        Path(model_dir, "config.json").write_text(json.dumps(QWEN3_8B))
        return [measure(model_dir, n, steps, compression) for n in running]
