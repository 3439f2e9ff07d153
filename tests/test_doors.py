"""--kv-cache-dtype dms is accepted wherever vLLM takes an engine's arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.config import cache

DMS = ["--kv-cache-dtype", "dms"]
# From vLLM 0.33 on the parser takes any value, and `CacheConfig` refuses it.
UNKNOWN = "dmz" if hasattr(cache, "register_kv_cache_dtype") else "exit 2"

# name -> (command line, what is to be parsed)
DOORS = {
    "serve": (["serve", "model", *DMS], "dms"),
    "serve, fp8 storage": (["serve", "model", "--kv-cache-dtype=dms_fp8"], "dms_fp8"),
    "serve, stock value": (["serve", "model", "--kv-cache-dtype", "fp8"], "fp8"),
    "serve, unknown value": (["serve", "model", "--kv-cache-dtype", "dmz"], UNKNOWN),
    "launch render": (["launch", "render", "model", *DMS], "dms"),
    "bench latency": (["bench", "latency", *DMS], "dms"),
    "bench throughput": (["bench", "throughput", *DMS], "dms"),
    "bench startup": (["bench", "startup", *DMS], "dms"),
    # A client: the flag belongs to the server it talks to.
    "bench serve": (["bench", "serve", "--model", "model"], None),
    "bench serve, with the flag": (["bench", "serve", *DMS], "exit 2"),
    "run-batch": (["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", *DMS], "dms"),
}


@pytest.fixture(scope="module")
def parsed():
    lines = [line for line, _ in DOORS.values()]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("parse_doors.py"), json.dumps(lines)],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(DOORS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("door", DOORS)
def test_the_vllm_command_accepts_the_flag(parsed, door):
    assert parsed[door] == DOORS[door][1]


def test_python_arguments_accept_the_flag(tmp_path):
    from vllm.config import CacheConfig
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    for cls in (EngineArgs, AsyncEngineArgs):  # what LLM(...) and the API servers build
        args = cls(model=str(tmp_path), kv_cache_dtype="dms")
        assert CacheConfig(cache_dtype=args.kv_cache_dtype).cache_dtype == "dms"
    with pytest.raises(ValueError, match="cache_dtype"):
        CacheConfig(cache_dtype="dmz")


def test_a_parser_built_from_the_engine_arguments_accepts_the_flag():
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for cls in (AsyncEngineArgs, EngineArgs):  # the first one is what loads the plugins
        args = cls.add_cli_args(FlexibleArgumentParser()).parse_args(DMS)
        assert args.kv_cache_dtype == "dms"


def test_the_free_name_of_an_attention_backend_is_left_to_other_plugins():
    """Until a DMS model is built."""
    code = (
        "from vllm.plugins import load_general_plugins as load; load()\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as Enum\n"
        "print(Enum.CUSTOM.is_overridden())\n"
        "import vllm_dms.backend.attention\n"
        "print(Enum.CUSTOM.get_class().__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-2:] == ["False", "DMSCompactAttentionBackend"], done.stderr[-2000:]
