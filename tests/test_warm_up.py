"""Nothing is compiled while serving: what warms up asks for all that any batch will."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import Case, assert_null_state_untouched
from test_compile import KERNELS
from test_projection import make_projection

from vllm_dms.backend.updates import NULL_STEP, Reporter, apply_updates

SCRIPT = Path(__file__).with_name("specializations.py")


@pytest.mark.parametrize(
    "how",
    [["bfloat16"], ["bfloat16", "flash"], ["fp8"], ["int4", "flash"], ["float32"]],
    ids=" ".join,
)
def test_no_batch_needs_a_kernel_that_the_warm_up_did_not(how):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *how]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    others = {"alpha_kernel"}  # the adapter's is vLLM's to warm up, with the model
    others.add("prefill_kernel" if "flash" in how else "prefill_stored_kernel")
    assert {*found["warm"]} == KERNELS - others
    assert found["later"] == []
    assert found["unaligned"] == ["decode_kernel"], "nothing is noticed"


@pytest.mark.parametrize(("storage", "dim"), [("model", 16), ("fp8", 16), ("int4", 64)])
def test_the_warm_up_leaves_nothing_behind(storage, dim):
    case = replace(Case(storage=storage, dim=dim), lengths=(12,))
    harness = case.harness(kernels=True)
    state = harness.state
    before = [part.view(torch.uint8).clone() for part in state.pages]
    live = state.live[1:].clone()
    harness.ops.warm_up(case.dtype, None)
    harness.ops.warm_up(case.dtype, make_projection(case))
    reporter = Reporter(state, harness.ops)
    reporter.warm_up()
    apply_updates(state, NULL_STEP)
    assert_null_state_untouched(harness)
    assert torch.equal(live, state.live[1:])
    assert not state.state_of_block.any()
    for part, old in zip(state.pages, before, strict=True):
        assert torch.equal(part.view(torch.uint8), old)
    assert len(reporter.report(replace(NULL_STEP, states=np.ones(1, np.int32))).usage.live) == 1
