"""vLLM's own schedulers over `DMSManager`, with workers that only count."""

import functools
import json
import tempfile
from collections import deque
from dataclasses import replace
from pathlib import Path

import torch
from core_worker import Worker
from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_dms import plugin
from vllm_dms.arena.layout import ArenaLayout
from vllm_dms.arena.spec import DMSCacheSpec, make_spec
from vllm_dms.arena.storage import ModelStorage
from vllm_dms.config import DMSConfig
from vllm_dms.core.integrity import check_integrity
from vllm_dms.core.scheduler import CutAsyncScheduler, CutScheduler
from vllm_dms.gates import transfer_config

init_none_hash(sha256)
HASHER = get_request_block_hasher(16, sha256)
MAX_MODEL_LEN = 256
CHUNK = 48
MODEL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 65536,
    "torch_dtype": "float32",
}


def make_layout(**overrides) -> ArenaLayout:
    values = {
        "num_layers": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "window": 15,
        "page_size": 8,
        "block_size": 16,
        "storage": ModelStorage(torch.float32),
        "max_model_len": MAX_MODEL_LEN,
    }
    return ArenaLayout(**{**values, **overrides})


@functools.cache
def make_config(
    reserve_compression=1.0,
    chunk=CHUNK,
    max_model_len=MAX_MODEL_LEN,
    block_size=16,
    policy="fcfs",
    prefix_cache=False,
) -> tuple[VllmConfig, DMSConfig]:
    plugin.register()
    config = DMSConfig(
        dialect="nvidia-borrowed",
        window=15,
        alpha_scale=1.0,
        alpha_offset=0.0,
        shift=1,
        reserve_compression=reserve_compression,
        prefix_cache=prefix_cache,
    )
    with tempfile.TemporaryDirectory() as model_dir:
        Path(model_dir, "config.json").write_text(json.dumps(MODEL))
        vllm_config = VllmConfig(
            model_config=ModelConfig(
                model=model_dir,
                skip_tokenizer_init=True,
                dtype="float32",
                max_model_len=max_model_len,
            ),
            scheduler_config=SchedulerConfig(
                max_num_seqs=4,
                max_num_batched_tokens=chunk,
                max_model_len=max_model_len,
                is_encoder_decoder=False,
                async_scheduling=False,
                policy=policy,
            ),
            cache_config=CacheConfig(block_size=block_size, enable_prefix_caching=False),
            kv_transfer_config=transfer_config(),
        )
    vllm_config.additional_config = {"dms": config.to_dict()}
    return vllm_config, config


class Engine:
    """Scheduler and workers; outputs reach the scheduler ``lag`` steps late. Checks every step."""

    def __init__(self, vllm_config, config, num_blocks, lag=0, ranks=1, seed=0, layout=None):
        layout = layout or make_layout(max_model_len=vllm_config.model_config.max_model_len)
        self.spec: DMSCacheSpec = replace(make_spec(vllm_config, config, layout), num_ranks=ranks)
        vllm_config.cache_config.num_gpu_blocks = num_blocks
        scheduler = AsyncScheduler if lag else Scheduler
        if config.prefix_cache:
            scheduler = CutAsyncScheduler if lag else CutScheduler
        self.scheduler = scheduler(
            vllm_config=vllm_config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], self.spec)],
            ),
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=layout.block_size,
            log_stats=True,
        )
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.connector = self.scheduler.connector
        self.workers = [Worker(layout, self.spec.max_num_seqs, seed + r) for r in range(ranks)]
        self.lag = lag
        self.in_flight = deque()
        self.keep: dict[str, float] = {}
        self.finished: dict[str, object] = {}  # request id -> finish reason
        self.params: dict[str, object] = {}  # request id -> kv_transfer_params
        self.num_preemptions = 0
        self.max_blocks_held = 0

    def add(
        self, request_id, num_prompt, max_tokens, keep, priority=0, turn=False, ids=None, salt=None
    ) -> Request:
        """keep: share of past-window tokens that its rows keep. turn: of a session with streaming
        input, which goes on until `close`. ids: the prompt, if it matters."""
        self.keep[request_id] = keep
        self.finished.pop(request_id, None)
        request = Request(
            request_id=request_id,
            prompt_token_ids=ids or [1] * num_prompt,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            pooling_params=None,
            priority=priority,
            resumable=turn,
            cache_salt=salt,
            block_hasher=HASHER,
        )
        self.scheduler.add_request(request)
        return request

    def close(self, request_id) -> None:
        """No further turn: the session ends when it has nothing left to do."""
        params = SamplingParams(max_tokens=1)
        self.scheduler.add_request(Request(request_id, [1], params, None, resumable=False))

    def knows(self, request_id) -> bool:
        in_flight = any(request_id in output.num_scheduled_tokens for output, *_ in self.in_flight)
        return in_flight or request_id in self.scheduler.requests

    def step(self) -> None:
        output = self.scheduler.schedule()
        self.check()
        self.num_preemptions += len(output.preempted_req_ids or ())
        requests = [self.scheduler.requests[r] for r in output.num_scheduled_tokens]
        samples = [not r.is_prefill_chunk for r in requests]
        held = self._held()
        self.max_blocks_held = max(self.max_blocks_held, sum(len(b) for b in held.values()))
        # What is sampled is always 7, so it is known before it is.
        texts = [([*r.all_token_ids, *[7] * MAX_MODEL_LEN], r.cache_salt) for r in requests]
        self.in_flight.append((output, samples, held, texts))
        if len(self.in_flight) > self.lag or not requests:
            self.complete()

    def complete(self) -> None:
        """Run the oldest step and give its output to the scheduler."""
        output, samples, held, *texts = self.in_flight.popleft()
        meta = output.kv_connector_metadata
        scheduled = output.num_scheduled_tokens
        keep = [self.keep[r] for r in scheduled]
        reports = [w.run(meta, scheduled.values(), keep, *texts) for w in self.workers]
        for worker in self.workers:
            for (state, _), blocks in held.items():
                used = worker.blocks_used(state)
                assert used == blocks[: len(used)], "a page outside of the blocks held"
            for owner, blocks in self._held().items():
                if owner in held:
                    assert len(worker.blocks_used(owner[0])) <= len(blocks), "returned while in use"
        report = reports[0]
        for other in reports[1:]:
            report = report.aggregate(other)
        result = ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={r: i for i, r in enumerate(scheduled)},
            sampled_token_ids=[[7] if sample else [] for sample in samples],
            kv_connector_output=KVConnectorOutput(
                kv_connector_worker_meta=report if scheduled else None,
                invalid_block_ids=set(meta.fail_blocks),
                finished_recving=set(meta.fail_requests),
                failed_recving=set(meta.fail_requests),
            ),
        )
        for outputs in self.scheduler.update_from_output(output, result).values():
            for out in outputs.outputs:
                if out.finish_reason is not None:
                    self.finished[out.request_id] = str(out.finish_reason)
                    self.params[out.request_id] = out.kv_transfer_params
        self.check()

    def drain(self, max_steps=3000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished_requests() and not self.in_flight:
                return
            if self.scheduler.has_unfinished_requests():
                self.step()
            else:
                self.complete()
        raise AssertionError("the engine does not come to an end")

    def check(self) -> None:
        check_integrity(self.manager)

    def _held(self) -> dict[tuple[int, int], list[int]]:
        """(state index, its tenancy) -> block ids, for requests that hold blocks."""
        ledger, blocks = self.manager.ledger, self.manager.req_to_blocks
        states = {r: ledger.state_of(r) for r in ledger.requests}
        return {
            (state, int(ledger.tenancy[state])): [b.block_id for b in blocks[r]]
            for r, state in states.items()
        }


def make_engine(
    reserve_compression=1.0, extra_blocks=0, policy="fcfs", prefix_cache=False, **kwargs
) -> Engine:
    """Over the smallest pool that vLLM's start-up check lets through, and some more."""
    vllm_config, config = make_config(reserve_compression, policy=policy, prefix_cache=prefix_cache)
    spec = make_spec(vllm_config, config, make_layout())
    num_blocks = spec.max_blocks(MAX_MODEL_LEN) + 1 + extra_blocks
    return Engine(vllm_config, config, num_blocks, **kwargs)
