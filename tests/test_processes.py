"""Engine cores and workers as processes of their own, as in production: parallel in two ways."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import vllm
from adapter_parts import split_adapter
from engines import NOISE, engine_args, prompts

from vllm_dms.reference import ReferenceModel

# An IndexError of stock vLLM 0.33.0: the second engine looks for a memory node of its own.
SECOND_ENGINE = pytest.mark.skipif(
    vllm.__version__.startswith("0.33.0")
    and not torch.cuda.is_available()
    and len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) < 2,
    reason="vLLM 0.33.0 can't run two engines on a CPU with one memory node",
)


def run_job(job, tmp_path) -> dict:
    """What `spawned_engine.py` writes."""
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("spawned_engine.py")
    run = subprocess.run(
        [sys.executable, str(script), json.dumps(job), str(tmp_path / "out.json")],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two workers need two GPUs")
@pytest.mark.parametrize(
    ("parallel", "dialect"),
    [
        ("tensor_parallel_size", "nvidia-adapter"),
        ("tensor_parallel_size", "nvidia-borrowed"),
        ("tensor_parallel_size", "adapter over a base"),
        pytest.param("data_parallel_size", "nvidia-borrowed", marks=SECOND_ENGINE),
    ],
)
@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.gpu)])
def test_two_spawned_workers_are_exact(checkpoint, tmp_path, parallel, dialect, eager):
    """Tensor parallel: the adapter is computed on every rank; each keeps its own head; reports are
    merged. Data parallel: two engines, each with a cache of its own."""
    over_base = dialect == "adapter over a base"
    path = model = checkpoint("nvidia-adapter" if over_base else dialect)
    kwargs = {"enforce_eager": eager, "gpu_memory_utilization": 0.5, parallel: 2}
    if over_base:
        model = tmp_path / "base"
        split_adapter(path, model, tmp_path / "adapter")
        kwargs["additional_config"] = {"dms": {"adapter": str(tmp_path / "adapter")}}
    job = {
        "model": str(model),
        "args": engine_args(96, **kwargs),
        "prompts": prompts((30, 250, 600)),
        "max_tokens": 24,
    }
    out = run_job(job, tmp_path)
    reference = ReferenceModel.from_dir(path)
    eligible = evicted = 0
    for prompt, (ids, steps) in zip(job["prompts"], out["answers"], strict=True):
        forward = reference.forward(prompt + ids)
        rows = forward.logits.log_softmax(-1)
        past = len(prompt + ids) - 1 - (reference.dms.window + 1)  # the last is never stored
        eligible += past
        evicted += forward.evict[..., :past].float().sum(-1).mean().item()
        for i, entries in enumerate(steps):
            row = rows[len(prompt) - 1 + i]
            assert all(abs(row[int(t)].item() - lp) < NOISE for t, lp in entries.items())
    metrics, slack = out["metrics"], 5 * len(job["prompts"])  # reports still in flight at the end
    engines = job["args"].get("data_parallel_size", 1)
    assert [len(values) for values in metrics.values()] == [engines] * len(metrics)
    assert all(metrics["eligible_tokens"])
    assert eligible - slack <= sum(metrics["eligible_tokens"]) <= eligible
    assert evicted - slack <= sum(metrics["evicted_tokens"]) <= evicted


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two workers need two GPUs")
def test_two_ranks_keep_and_restore_the_same_states(checkpoint, tmp_path):
    """Each its own head, with as many pages as that keeps; blocks are by the fullest."""
    path = checkpoint("nvidia-borrowed")
    document, *questions = prompts((300, 20, 30, 40, 50))
    settings = {"dms": {"prefix_cache": True}}
    parallel = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.5}
    job = {
        "model": str(path),
        "args": engine_args(96, enforce_eager=True, additional_config=settings, **parallel),
        "prompts": [document + question for question in questions],
        "max_tokens": 24,
    }
    out = run_job(job, tmp_path)
    reference = ReferenceModel.from_dir(path)
    for prompt, (ids, steps) in zip(job["prompts"], out["answers"], strict=True):
        rows = reference.forward(prompt + ids).logits.log_softmax(-1)
        for i, entries in enumerate(steps):
            row = rows[len(prompt) - 1 + i]
            assert all(abs(row[int(t)].item() - lp) < NOISE for t, lp in entries.items())
    # The document was read once: what left the window after it, four times.
    past = 300 - 12 - 17 + sum(12 + len(q) + 23 for q in questions)
    assert abs(sum(out["metrics"]["eligible_tokens"]) - past) <= 5 * len(questions)
    assert out["metrics"]["kept_states"] > [0]
