"""How fast a retrofit trains on one GPU: its attention kernels, and whole steps of a model of
Qwen3-8B's shape with random weights. Needs torch, triton and transformers, no vLLM.

    python -m benchmarks.bench_retrofit --out FILE.json [--minutes 5]

Gradients against double precision and their bits when run again; each kernel with several tiles,
beside torch's own attention; tokens a second and memory of whole steps, and where the time goes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from vllm_dms.retrofit import attention as module
from vllm_dms.retrofit.attention import GatedAttention, Tile, Tiles, plain
from vllm_dms.retrofit.determinism import deterministic
from vllm_dms.retrofit.recipe import Recipe
from vllm_dms.retrofit.trainer import Trainer

from .certificate import certificate, command_and_date

SHAPE = dict(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
    tie_word_embeddings=False,
)  # fmt: skip
HEADS, KV_HEADS, DIM, WINDOW, LENGTHS = 32, 8, 128, 512, (8192, 16384, 32768)
TILES = {
    "forward": [
        (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3),
    ],
    "query_gradient": [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3),
    ],
    "key_gradient": [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3),
        (32, 64, 4, 3),
    ],
}  # fmt: skip
# Products of a tile of scores with a head's channels.
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_gradient": 4}


def inputs(tokens, heads=HEADS, kv_heads=KV_HEADS, dim=DIM, dtype=torch.bfloat16, batch=1):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(batch, tokens, heads, dim), *2 * [(batch, tokens, kv_heads, dim)]]
    qkv = [torch.randn(s, generator=generator, device="cuda").to(dtype) for s in shapes]
    logits = torch.randn(batch, kv_heads, tokens, generator=generator, device="cuda")
    return [*qkv, F.logsigmoid(4 * logits)]


def milliseconds(function, repeats=5) -> float:
    """The median of several runs."""
    function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def call(kernel: str, tile: tuple, tensors, saved):
    """-> a function that runs one kernel"""
    tiles = Tiles(*3 * [Tile(*tile)])
    q, k, v, gate = tensors
    lse, delta = saved
    gradient = (q, k, v, gate, q, lse, delta, WINDOW, tiles)
    return {
        "forward": lambda: module.launch_forward(q, k, v, gate, WINDOW, tiles),
        "query_gradient": lambda: module.launch_query_gradient(*gradient),
        "key_gradient": lambda: module.launch_key_gradient(*gradient),
    }[kernel]


def ready(tokens):
    """For `call`; lse and delta need not be right for speed."""
    rows = torch.full((1, HEADS, tokens), 9.0, device="cuda")
    return inputs(tokens), (rows, torch.zeros_like(rows))


def compile_all() -> None:
    """Fills Triton's cache, a process for each tile."""
    jobs = [f"{kernel}:{json.dumps(tile)}" for kernel, tiles in TILES.items() for tile in tiles]
    command = [sys.executable, "-m", "benchmarks.bench_retrofit", "--compile"]
    running = [subprocess.Popen([*command, job], stderr=subprocess.DEVNULL) for job in jobs]
    for process in running:
        process.wait()


def compile_one(job: str) -> None:
    kernel, tile = job.split(":", 1)
    call(kernel, json.loads(tile), *ready(512))()
    torch.cuda.synchronize()


def check_gradients() -> list[dict]:
    """The kernels beside the plain version, both against double precision."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for batch, tokens, heads, kv_heads, dim in (
            (2, 1024, 8, 2, 128), (1, 1000, 6, 2, 80), (1, 776, 4, 4, 64), (1, 648, 3, 1, 96),
        ):  # fmt: skip
            tensors = inputs(tokens, heads, kv_heads, dim, dtype, batch)
            weights = torch.randn_like(tensors[0])

            def results(function, tensors, weights=weights):
                tensors = [x.detach().requires_grad_() for x in tensors]
                out = function(*tensors, 100)
                return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), tensors)]

            truth = results(plain, [x.double() for x in tensors])
            mine = [results(GatedAttention.apply, tensors) for _ in range(2)]
            other = results(plain, tensors)

            def errors(values, truth=truth):
                pairs = zip(values, truth, strict=True)
                return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

            found.append({"dtype": str(dtype), "shape": [batch, tokens, heads, kv_heads, dim]})
            found[-1] |= {"kernels": errors(mine[0]), "plain": errors(other)}
            found[-1]["same_bits"] = all(map(torch.equal, *mine))
    return found


def tune(tokens: int) -> dict:
    tensors, saved = ready(tokens)
    work = 2 * tokens * tokens / 2 * DIM * HEADS
    found = {}
    for kernel, tiles in TILES.items():
        for tile in tiles:
            run = call(kernel, tile, tensors, saved)
            found[f"{kernel} {tile}"] = rate(run, PRODUCTS[kernel] * work)
    q, k, v = (x.transpose(1, 2) for x in tensors[:3])

    def dense():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend), torch.no_grad():
            found[f"torch {backend.name}"] = rate(dense, 2 * work)
    return found


def rate(function, work: float) -> dict:
    try:
        time_ms = milliseconds(function)
    except (RuntimeError, OutOfResources) as error:  # more than this GPU has
        return {"error": str(error)[:200]}
    return {"ms": round(time_ms, 3), "tflops": round(work / time_ms / 1e9, 1)}


def best(found: dict) -> Tiles:
    def time(kernel, tile):
        return found[f"{kernel} {tile}"].get("ms", 1e9)

    return Tiles(*(Tile(*min(TILES[k], key=lambda tile: time(k, tile))) for k in TILES))


def random_model():
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE), dtype=torch.bfloat16)


def trainer_for(model, tokens: int, work: Path) -> Trainer:
    recipe = Recipe(window=WINDOW, length=tokens, batch=2, micro_batch=1, steps=10)
    rows = torch.randint(0, SHAPE["vocab_size"], (4, tokens), dtype=torch.int32)
    trainer = Trainer(model, rows, recipe, work)
    for name, parameter in trainer.trained.items():  # decisions of both kinds
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.001)
    return trainer


def steps(model, tokens: int, work: Path) -> dict:
    torch.cuda.reset_peak_memory_stats()
    trainer = trainer_for(model, tokens, work)
    trainer.train_step(0.5, with_record=False)
    torch.cuda.synchronize()
    started, record = time.monotonic(), None
    for _ in range(2):
        record = trainer.train_step(0.5, with_record=True)
    torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / 2
    return {
        "tokens": tokens,
        "recomputed_layers": trainer.recompute,
        "seconds_a_step": seconds,
        "tokens_a_second": trainer.recipe.batch * tokens / seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        "share_evicted": record["share_evicted"],
        "kl": record["kl"],
    }


def profile(model, tokens: int, work: Path) -> list[dict]:
    trainer = trainer_for(model, tokens, work)
    trainer.train_step(0.5, with_record=False)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        trainer.train_step(0.5, with_record=False)
        torch.cuda.synchronize()
    rows = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:40]
    return [
        {"kernel": e.key[:120], "ms": e.self_device_time_total / 1e3, "calls": e.count}
        for e in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="where there is no .git to ask")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        return compile_one(args.compile)
    report = {**command_and_date(), **certificate(args.commit)}

    def record(name, value) -> None:
        report[name] = value
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps({name: value}), flush=True)

    compile_all()
    record("gradients", check_gradients())
    record("tiles", tune(8192))
    chosen = best(report["tiles"])
    record("chosen", chosen._asdict())
    record("tiles_32768", tune(32768))
    module.choose_tiles = lambda q: chosen
    with tempfile.TemporaryDirectory() as work, deterministic():
        model = random_model()
        for tokens in LENGTHS:
            try:
                record(f"step_{tokens}", steps(model, tokens, Path(work)))
            except torch.OutOfMemoryError as error:
                record(f"step_{tokens}", {"error": str(error)[:300]})
            if tokens == LENGTHS[0]:
                record(f"profile_{tokens}", profile(model, tokens, Path(work)))


if __name__ == "__main__":
    main()
