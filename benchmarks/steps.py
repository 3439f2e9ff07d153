"""What `vllm bench` does not measure: decode steps beside which nothing else happens, how many
requests a pool holds, and the host time of a step.

`measure` starts this file as a process: one engine, which writes its rows as they come.
"""

import itertools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import processes
from arms import Arm
from processes import RunError
from record import Row

DECODE = ("decode-8k", "capacity-8k", "saturated-8k")
HOST = ("host-mixed", "host-decode")
PROMPT, HOST_PROMPT = 8192, 640  # tokens
HOST_LEVELS = (16, 128, 512)
MIXED_TIMES = 20  # steps of host-mixed


@dataclass(frozen=True)
class Plan:
    """What to run in one engine."""

    workloads: list[str]
    prompt_len: int
    levels: list[int]  # requests that decode at once, rising
    num_steps: int  # of a measurement
    max_requests: int  # max_num_seqs
    chunk: int  # max_num_batched_tokens
    scale: int

    @classmethod
    def of(cls, workloads: list[str], options: Namespace) -> "Plan":
        prompt_len, levels, most = PROMPT, options.levels, options.max_requests
        if workloads[0] in HOST:
            most = min(most, HOST_LEVELS[-1])
            prompt_len, levels = HOST_PROMPT, [level for level in HOST_LEVELS if level <= most]
        others = (levels, options.steps, most, options.chunk, options.scale)
        return cls(workloads, prompt_len // options.scale, *others)

    @property
    def output_limit(self) -> int:
        """Tokens after which a request would end: after all that is measured."""
        ramp = math.ceil(self.max_requests * self.prompt_len / self.chunk)
        mixed = 8 * MIXED_TIMES if "host-mixed" in self.workloads else 0
        return ramp + mixed + (len(self.levels) + 4) * (self.num_steps + 16)

    def limits(self) -> dict[str, int]:
        most, length = self.max_requests, self.prompt_len + self.output_limit
        # vLLM captures graphs up to 512 requests. Where more run, all arms get these as well.
        graphs = {"max_cudagraph_capture_size": most} if most > 512 else {}
        return {"max_model_len": length, "max_num_seqs": most, **graphs}


def measure(
    arm: Arm, workloads: list[str], engine: dict[str, Any], options: Namespace, deadline: float
) -> Iterator[Row]:
    """``engine``: the entry of this engine in the run's record"""
    log = options.out / f"{engine['arm']}-{engine['group']}.log"
    lines, plan = log.with_suffix(".jsonl"), asdict(Plan.of(workloads, options))
    lines.write_text("")
    spec = {"engine": engine["args"], "plan": plan, "seed": options.seed, "to": str(lines)}
    spec["flash_attn_version"] = options.flash_attn_version if arm.dms is None else None
    # With clocks in it, the engine's core is in the process itself.
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if workloads[0] in HOST else {}
    problem = None
    try:
        processes.run(arm, [sys.executable, __file__, json.dumps(spec)], log, deadline, **env)
    except RunError as error:
        problem = error
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    engine["facts"] = found[:1]
    yield from found[1:]
    if problem:
        raise problem


def run_engine(spec: dict[str, Any]) -> None:
    """The process that `measure` starts."""
    from decode import decode_rows
    from driver import Driver
    from host_time import host_rows
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    args = EngineArgs(**spec["engine"], skip_tokenizer_init=True, disable_log_stats=False)
    config = args.create_engine_config(UsageContext.LLM_CLASS)
    if version := spec["flash_attn_version"]:  # no flag moves TurboQuant from version 2
        config.attention_config.flash_attn_version = version
    engine = LLMEngine.from_vllm_config(config, usage_context=UsageContext.LLM_CLASS)
    driver = Driver(engine, engine.model_config.get_vocab_size(), spec["seed"])
    cache, compilation = engine.vllm_config.cache_config, engine.vllm_config.compilation_config
    facts: Row = {"pool_tokens": cache.num_gpu_blocks * cache.block_size}
    facts["async_scheduling"] = engine.vllm_config.scheduler_config.async_scheduling
    facts |= {"compilation": compilation.mode.name, "cudagraphs": compilation.cudagraph_mode.name}
    plan = Plan(**spec["plan"])
    if plan.workloads[0] in HOST:
        rows = host_rows(driver, plan)
    else:
        rows = decode_rows(driver, plan, facts["pool_tokens"])
    with Path(spec["to"]).open("w", buffering=1) as file:
        for line in itertools.chain([facts], rows):
            print(json.dumps(line), file=file)


if __name__ == "__main__":
    run_engine(json.loads(sys.argv[1]))
