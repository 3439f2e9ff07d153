"""What several GPUs are worth to a retrofit: whole steps of a model of Qwen3-8B's shape with random
weights, by one process and by one per GPU, which hold the whole model or a share of it.

    python -m benchmarks.bench_retrofit_gpus --gpus 2 --out FILE.json [--length 8192]

Each row is a process group of its own, one after the other. Without a GPU, or with --tiny, a
rehearsal. Needs torch, triton and transformers, no vLLM.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from vllm_dms.retrofit.determinism import deterministic
from vllm_dms.retrofit.processes import Processes, joined
from vllm_dms.retrofit.recipe import Recipe
from vllm_dms.retrofit.sharding import held
from vllm_dms.retrofit.trainer import Trainer

from .bench_retrofit import SHAPE, WINDOW
from .certificate import certificate, command_and_date

TINY = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, vocab_size=320)  # fmt: skip
STEPS = 3


def measure(args: argparse.Namespace, processes: Processes, device: torch.device) -> dict:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        config = Qwen3Config(**SHAPE | (TINY if args.tiny else {}))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    recipe = Recipe(window=WINDOW, length=args.length, batch=args.batch, steps=10)
    rows = torch.randint(0, 320, (args.batch, args.length), dtype=torch.int32)
    with tempfile.TemporaryDirectory() as work:
        trainer = Trainer(model, rows, recipe, Path(work), processes=processes, device=device)
    for name, parameter in trainer.trained.items():  # decisions of both kinds
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.001)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.train_step(0.5, with_record=True)
    if processes.size > 1:
        dist.barrier()
    started = time.monotonic()
    for _ in range(STEPS):
        # A record waits for the device, and for the sum over all processes.
        record = trainer.train_step(0.5, with_record=True)
    seconds = (time.monotonic() - started) / STEPS
    row = {
        "processes": processes.size,
        "shard": processes.shard,
        "tokens_a_row": args.length,
        "rows_a_step": args.batch,
        "recomputed_layers": trainer.recompute,
        "parameters_held": held(model),
        "seconds_a_step": round(seconds, 4),
        "tokens_a_second": round(args.batch * args.length / seconds, 1),
        "kl": record["kl"],
        "share_evicted": record["share_evicted"],
    }
    if device.type == "cuda":
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    return row


def one(args: argparse.Namespace) -> None:
    with deterministic(), joined() as (processes, device):
        processes = Processes(processes.rank, processes.size, args.shard)
        row = measure(args, processes, device)
        if processes.main:
            args.out.write_text(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--gpus", type=int, default=2)
    add("--length", type=int, default=8192)
    add("--batch", type=int, default=4, help="rows a step, shared by all processes")
    add("--out", type=Path, required=True)
    add("--tiny", action="store_true", help="a rehearsal: another shape")
    add("--commit", help="where there is no .git to ask")
    add("--shard", action="store_true", help=argparse.SUPPRESS)
    add("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args)
    found = {**command_and_date(), **certificate(args.commit), "rows": []}
    settings = ["--one", "--length", str(args.length), "--batch", str(args.batch)]
    settings += ["--tiny"] if args.tiny else []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.gpus)]
    for launcher, extra in (([], []), (torchrun, []), (torchrun, ["--shard"])):
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "row.json"
            command = [sys.executable, *launcher, "-m", "benchmarks.bench_retrofit_gpus", *settings]
            done = subprocess.run([*command, *extra, "--out", str(out)])
            row = json.loads(out.read_text()) if done.returncode == 0 else {"failed": command[1:]}
        if "seconds_a_step" in row and "seconds_a_step" in (found["rows"] or [{}])[0]:
            row["over_one"] = round(row["tokens_a_second"] / found["rows"][0]["tokens_a_second"], 3)
        found["rows"].append(row)
        print(json.dumps(row), flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if any("failed" in row for row in found["rows"]):
        sys.exit("not all rows were measured: see above")


if __name__ == "__main__":
    main()
