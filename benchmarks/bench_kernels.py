"""Each kernel by itself on one GPU: a correctness gate, then time and share of copy bandwidth.

    python benchmarks/bench_kernels.py [--storage bf16 fp8] [--batches 1 8 32] [--json out.json]
    python benchmarks/bench_kernels.py --tune decode prefill [--seconds 150]

Shape: Qwen3-8B's attention (8 KV heads, 4 query heads each, head_dim 128), window 512, pages of 64,
context 8192. Live lengths are uneven over heads, as in a trained checkpoint: keep rates are
log-normal, their mean such that a row holds 1,480 slots on average.

Times are medians over CUDA graph replays; each graph walks through layers whose slots together are
several times the L2 cache.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch
from kernel_arena import GROUP, HEADS, STORAGE, WINDOW, Arena
from kernel_timing import copy_bandwidth, time_copy, time_graph
from kernel_tuning import TUNING_GRIDS, tune

BATCHES = (1, 8, 32, 64, 128, 256, 480)
PREFILLS = ((2048, 0), (8192, 0), (2048, 8192), (2048, 32768))  # query tokens, tokens stored before


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm()).item()


def gate(name: str, value: float, limit: float = 1e-2) -> None:
    """Refuse to time a kernel that is wrong. NaN is never below the limit."""
    if not value < limit:
        raise SystemExit(f"{name}: relative error {value:.2e} is not below {limit:.0e}; not timed")


def gate_store(name: str, arena: Arena) -> None:
    """Stores copy, round and decide: nothing to be tolerated."""
    found, exact = (arena.stored_rows(ops, 0) for ops in (arena.ops, arena.plain))
    if not all(torch.equal(a, b) for a, b in zip(found, exact, strict=True)):
        raise SystemExit(f"{name}: not what the plain operations store; not timed")


def bench_decode(storage: str, batch: int) -> dict:
    """Microseconds per layer of store and decode for ``batch`` requests with one token each."""
    arena = Arena(STORAGE[storage], batch, chunk=1, stored=8191)
    gate_store(f"store {storage} B={batch}", arena)
    arena.store(0)
    arena.decode(0)
    gate(f"decode {storage} B={batch}", error(*arena.decoded_rows(0)))
    layers = range(1, arena.num_layers)
    arena.restore()
    store = time_graph(lambda: [arena.store(i) for i in layers]) / len(layers)
    arena.restore()
    arena.decode(0)
    # Twice, apart: what disturbs a GPU for a moment can outlast all replays of one graph.
    decode = time_graph(lambda: [arena.decode(i) for i in layers]) / len(layers)
    both = time_graph(lambda: [(arena.store(i), arena.decode(i)) for i in layers]) / len(layers)
    decode = min(decode, time_graph(lambda: [arena.decode(i) for i in layers]) / len(layers))
    schedule = time_graph(lambda: arena.ops.begin_step(arena.batch))
    live = arena.saved_live[1 : batch + 1, 1:].float()
    num_bytes = live.sum().item() / len(layers) * arena.layout.slot_bytes
    arena.restore()
    arena.store(0)
    moved = arena.bytes_moved(0)
    return {
        "kernel": "decode",
        "storage": storage,
        "batch": batch,
        "mean_live": round(live.mean().item(), 1),
        "max_live": int(live.max().item()),
        "megabytes": round(num_bytes / 1e6, 2),
        "decode_us": round(decode, 2),
        "store_us": round(store, 2),
        "store_megabytes": round(moved["store"] / 1e6, 2),
        "both_us": round(both, 2),
        "copy_us": round(time_copy(num_bytes, len(layers)), 2),
        "schedule_us": round(schedule, 2),
        "bytes_per_s": num_bytes / (decode * 1e-6),
    }


def bench_prefill(storage: str, chunk: int, stored: int) -> dict:
    """Microseconds per layer of the three steps of a chunk of ``chunk`` tokens."""
    arena = Arena(STORAGE[storage], 1, chunk, stored)
    gate_store(f"store {storage} {chunk} after {stored}", arena)
    arena.store(0)
    arena.prefill(0)
    gate(f"prefill {storage} {chunk} after {stored}", error(*arena.prefilled_rows(0)), 2e-2)
    scores = arena.visible_pairs() * GROUP  # query heads times keys that they see
    moved = arena.bytes_moved(0)
    prefill = time_graph(lambda: arena.prefill(0), replays=10)

    def store() -> None:  # from the same state each time
        arena.restore()
        arena.store(0)

    restore = time_graph(arena.restore, replays=10)
    return {
        "kernel": "prefill",
        "storage": storage,
        "chunk": chunk,
        "stored": stored,
        "prefill_us": round(prefill, 2),
        "store_us": round(time_graph(store, replays=10) - restore, 2),
        "store_window_us": round(time_graph(lambda: arena.store_window(0), replays=10), 2),
        "keys_per_query": round(scores / (chunk * HEADS * GROUP), 1),
        "tflop_per_s": round(4 * scores * arena.layout.head_dim / prefill / 1e6, 1),
        **{f"{name}_megabytes": round(num_bytes / 1e6, 2) for name, num_bytes in moved.items()},
    }


def add_shares(row: dict, copy: float) -> None:
    """Of the copy bandwidth, for each kernel with time and bytes."""
    if "bytes_per_s" in row:
        row["share_of_copy"] = round(row["bytes_per_s"] / copy, 3)
    for name in ("store", "store_window", "prefill"):
        if f"{name}_megabytes" in row:
            seconds = max(row[f"{name}_us"], 0.01) * 1e-6
            row[f"{name}_share"] = round(row[f"{name}_megabytes"] * 1e6 / seconds / copy, 3)


def print_row(row: dict) -> None:
    if row["kernel"] == "decode":
        print(
            f"decode {row['storage']:5} B={row['batch']:<4} live {row['mean_live']:7.1f} "
            f"(max {row['max_live']}) {row['megabytes']:8.1f} MB  decode {row['decode_us']:8.2f} "
            f"us {row['bytes_per_s'] / 1e12:5.2f} TB/s {row['share_of_copy']:6.1%} of copy "
            f"(copy of as many: {row['copy_us']:.2f} us)  "
            f"store {row['store_us']:6.2f} ({row['store_share']:.1%})  both {row['both_us']:8.2f}  "
            f"schedule {row['schedule_us']:5.2f}",
            flush=True,
        )
    else:
        print(
            f"prefill {row['storage']:5} {row['chunk']:5} after {row['stored']:<6} "
            f"{row['keys_per_query']:7.1f} keys  prefill {row['prefill_us']:9.2f} us "
            f"{row['tflop_per_s']:6.1f} TFLOP/s  store {row['store_us']:7.2f} "
            f"({row['store_share']:.1%})  store_window {row['store_window_us']:6.2f} "
            f"({row['store_window_share']:.1%})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--storage", nargs="+", choices=STORAGE, default=list(STORAGE))
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument("--no-prefill", action="store_true")
    parser.add_argument("--tune", nargs="+", choices=TUNING_GRIDS)
    parser.add_argument("--seconds", type=float, default=150, help="time for --tune")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="where there is no .git to ask")
    args = parser.parse_args()

    torch.manual_seed(0)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {copy / 1e12:.2f} TB/s, window {WINDOW}")
    if args.tune:
        rows = tune(args.tune, args.storage, args.seconds)
    else:
        rows = []
        for storage in args.storage:
            for batch in args.batches:
                rows.append(bench_decode(storage, batch))
                add_shares(rows[-1], copy)
                print_row(rows[-1])
            for chunk, stored in () if args.no_prefill else PREFILLS:
                rows.append(bench_prefill(storage, chunk, stored))
                add_shares(rows[-1], copy)
                print_row(rows[-1])
    if args.json:
        from serving_results import git_commit, gpu_name, version_of

        about = {
            "command": shlex.join(["python", *sys.argv]),
            "gpu": gpu_name(),
            "commit": args.commit or git_commit(Path(__file__).parent),
            "versions": {name: version_of(name) for name in ("torch", "triton")},
            "copy_bytes_per_s": copy,
        }
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
