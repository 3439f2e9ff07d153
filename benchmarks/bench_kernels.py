"""Each kernel by itself on one GPU: a correctness gate, then time and share of copy bandwidth.

    python benchmarks/bench_kernels.py --json kernels.json [--storage bf16 fp8] [--batches 1 8 32]

Shape: Qwen3-8B's attention (8 KV heads, 4 query heads each, head_dim 128), window 512, pages of 64,
context 8192. Heads' keep rates are log-normal, rows hold 1,480 slots on average. Times are medians
over CUDA graph replays; each graph walks through layers with several times the L2 cache in slots.
"""

import argparse
from pathlib import Path

import torch
from kernel_arena import GROUP, HEAD_DIM, HEADS, SCALE, STORAGE, Arena
from kernel_timing import time_copy, time_flash, time_graph, write_rows

from vllm_dms.backend.flash import find_flash

BATCHES = (1, 8, 32, 64, 128, 256, 480)
# Query tokens, tokens stored before.
PREFILLS = (
    *((chunk, 0) for chunk in (128, 512, 1024, 2048, 4096, 8192)),
    *((2048, stored) for stored in (8192, 32768)),
)


def gate(name: str, rows: tuple[torch.Tensor, torch.Tensor], limit: float = 1e-2) -> None:
    """Refuse to time a kernel that is wrong. NaN is never below the limit."""
    found, exact = rows
    error = ((found.float() - exact).norm() / exact.norm()).item()
    if not error < limit:
        raise SystemExit(f"{name}: relative error {error:.2e} is not below {limit:.0e}; not timed")


def gate_store(name: str, arena: Arena) -> None:
    """Stores copy, round and decide: nothing to be tolerated."""
    if not all(torch.equal(*pair) for pair in arena.stored_rows(0)):
        raise SystemExit(f"{name}: not what the plain operations store; not timed")


def bench_decode(storage: str, batch: int) -> dict:
    """Microseconds per layer of store and decode for ``batch`` requests with one token each."""
    arena = Arena(STORAGE[storage], batch, chunk=1, stored=8191)
    gate_store(f"store {storage} B={batch}", arena)
    arena.store(0)
    arena.decode(0)
    gate(f"decode {storage} B={batch}", arena.attended_rows(0))
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
    return {
        **{"kernel": "decode", "storage": storage, "batch": batch},
        "mean_live": round(live.mean().item(), 1),
        "max_live": int(live.max().item()),
        "megabytes": round(num_bytes / 1e6, 2),
        "decode_us": round(decode, 2),
        "store_us": round(store, 2),
        "both_us": round(both, 2),
        "copy_us": round(time_copy(num_bytes, len(layers)), 2),
        "schedule_us": round(schedule, 2),
        "bytes_per_s": num_bytes / (decode * 1e-6),
    }


def bench_prefill(storage: str, chunk: int, stored: int, evict: bool, fast: bool) -> dict:
    """Microseconds per layer of the three steps of a chunk of ``chunk`` tokens, and of stock vLLM's
    dense attention to as many. ``fast``: with FlashAttention 3."""
    flash = find_flash(HEAD_DIM, torch.bfloat16, SCALE, torch.device("cuda")) if fast else None
    arena = Arena(STORAGE[storage], 1, chunk, stored, evict=evict, flash=flash)
    gate_store(f"store {storage} {chunk} after {stored}", arena)
    arena.store(0)
    arena.prefill(0)
    gate(f"prefill {storage} {chunk} after {stored}", arena.attended_rows(0), 2e-2)
    prefill = time_graph(lambda: arena.prefill(0), replays=20)

    def store() -> None:  # from the same state each time
        arena.restore()
        arena.store(0)

    restore = time_graph(arena.restore, replays=10)
    return {
        **{"kernel": "prefill", "storage": storage, "chunk": chunk, "stored": stored},
        **{"evict": evict, "flash": fast},
        "prefill_us": round(prefill, 2),
        "dense_us": time_flash(HEADS, GROUP, HEAD_DIM, chunk, stored),
        "store_us": round(time_graph(store, replays=10) - restore, 2),
        "store_window_us": round(time_graph(lambda: arena.store_window(0), replays=10), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--storage", nargs="+", choices=STORAGE, default=list(STORAGE))
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES, help="of decode")
    parser.add_argument("--flash", action="store_true", help='prefill of `"kernels": "flash"`')
    parser.add_argument("--json", type=Path, required=True, help="where results go")
    parser.add_argument("--commit", help="where there is no .git to ask")
    args = parser.parse_args()

    torch.manual_seed(0)
    jobs = [(bench_decode, storage, batch) for storage in args.storage for batch in args.batches]
    jobs += [
        (bench_prefill, storage, *lengths, evict, args.flash)
        for storage in args.storage
        for lengths in PREFILLS
        for evict in (True, False)
    ]
    write_rows(args.json, args.commit, (bench(*about) for bench, *about in jobs))


if __name__ == "__main__":
    main()
