"""The kernels compile for GPUs, on a machine without one. What they compute is tested in
Triton's interpreter, which takes programs that the compiler refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
KERNELS = {
    "schedule_kernel", "store_token_kernel", "store_plan_kernel", "store_copy_kernel",
    "prefill_kernel", "prefill_stored_kernel", "store_window_kernel", "decode_kernel",
    "merge_kernel", "report_kernel", "alpha_kernel", "project_token_kernel", "project_kernel",
    "project_window_kernel", "places_kernel", "copy_blocks_kernel", "record_kernel",
}  # fmt: skip
# These begin when the kernel before them has ended.
IN_TURN = {
    "schedule_kernel", "report_kernel", "alpha_kernel",
    "places_kernel", "copy_blocks_kernel", "record_kernel",
}  # fmt: skip
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227}  # of a program, by compute capability


def compiled(cache, *arguments):
    """What the script prints."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("storage", "head_dim", "group", "capability", "page_size", "max_pages"),
    [
        ("bfloat16", 128, 4, 90, 64, 2048),
        ("bfloat16", 256, 2, 89, 64, 2048),
        ("float16", 64, 1, 90, 64, 32),
        ("fp8", 128, 8, 90, 64, 2048),
        ("fp8", 80, 2, 90, 8, 2048),
        ("fp8", 16, 2, 90, 16, 32),
        ("float32", 128, 4, 90, 16, 2048),
        ("bfloat16", 128, 4, 80, 64, 2048),
        ("fp8", 128, 4, 89, 64, 2048),
        ("int4", 128, 4, 90, 64, 2048),
        ("int4", 64, 2, 80, 16, 32),
        ("bfloat16", 128, 4, 100, 16, 2048),
    ],
)
def test_every_kernel_compiles(
    storage, head_dim, group, capability, page_size, max_pages, tmp_path
):
    found = compiled(tmp_path, storage, head_dim, group, capability, page_size, max_pages)
    assert found.keys() == KERNELS
    # Decoding is all memory traffic: what spills would double it.
    per_token = (
        "decode_kernel",
        "merge_kernel",
        "alpha_kernel",
        "store_token_kernel",
        "project_token_kernel",
        "project_window_kernel",
    )
    spilled = 16 if storage != "float32" else 32  # whose products take registers, not tensor cores
    assert max(found[name][1] for name in per_token) <= spilled, found
    assert max(shared for _, _, shared, _ in found.values()) <= SHARED_KIB[capability] << 10, found
    # `test_overlap` says which accesses may come early; the compiler moved none there.
    early = {name: count for name, (*_, count) in found.items() if count is not None}
    if capability < 90:
        assert early == {}
    else:
        assert early.keys() == KERNELS - IN_TURN
        at_once = (
            "store_token_kernel",
            "store_plan_kernel",
            "project_token_kernel",
            "project_kernel",
            "project_window_kernel",
        )
        assert [early[name] for name in at_once] == [0] * 5


def test_what_goes_on_from_flash_attention_compiles_with_and_without_eviction(tmp_path):
    """Of Triton 3.6 ptxas crashed at the first of them, while there was a loop over nothing."""
    specs = [
        "float16:64:8:16:0", "float16:64:8:16:1", "bfloat16:128:4:64:0", "bfloat16:256:2:16:0",
        "fp8:80:5:16:0", "int4:128:4:16:0",
    ]  # fmt: skip
    found = compiled(tmp_path, "beside-flash", *specs)
    assert found.keys() == {*specs}
    assert max(shared for _, _, shared, _ in found.values()) <= SHARED_KIB[90] << 10, found
