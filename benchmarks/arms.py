"""What is compared: vLLM's own caches and DMS, on the same weights, with the same arguments."""

import json
from argparse import Namespace
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    checkpoint: str  # subdirectory of what synthetic.py made
    kv_cache_dtype: str
    dms: dict[str, Any] | None = None  # "dms" of --additional-config; None: without the plugin


ARMS = {
    "bf16": Arm("dense", "auto"),
    "fp8": Arm("dense", "fp8"),
    "turboquant_4bit_nc": Arm("dense", "turboquant_4bit_nc"),
    "int4_per_token_head": Arm("dense", "int4_per_token_head"),
    "dms": Arm("dms", "dms", {}),
    "dms_fp8": Arm("dms", "dms_fp8", {}),
    "dms_int4": Arm("dms", "dms_int4", {}),
    "dms_keep": Arm("dms", "dms", {"evict": False}),
}
# A stock cache, and DMS with as many bytes an element: their ratio is shown.
PAIRS = (("bf16", "dms"), ("fp8", "dms_fp8"))


def engine_args(arm: Arm, options: Namespace, limits: dict[str, int]) -> dict[str, Any]:
    """Arguments of EngineArgs; what is not here is vLLM's default. ``limits``: the workloads'"""
    args: dict[str, Any] = {
        "model": str(options.model / arm.checkpoint),
        "dtype": "bfloat16",
        "kv_cache_dtype": arm.kv_cache_dtype,
        "kv_cache_memory_bytes": int(options.pool_gib * 2**30),
        "max_num_batched_tokens": options.chunk,
        "enable_prefix_caching": False,
        "seed": 0,
        **limits,
    }
    if options.together:  # vLLM checks that so much is free; the pool's size is given
        args["gpu_memory_utilization"] = 0.1
    if options.eager:
        args["enforce_eager"] = True
    if options.compilation:
        args["compilation_config"] = options.compilation
    if options.quantization:
        args["quantization"] = options.quantization
    if arm.dms is not None:
        own = {"prefix_cache": True} if args["enable_prefix_caching"] else {}
        args["additional_config"] = {"dms": {**own, **options.dms, **arm.dms}}
    return args


def flags(args: dict[str, Any]) -> list[str]:
    """The same for a command line."""
    found = []
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            found += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return found
