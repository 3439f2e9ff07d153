"""Launch parameters of the kernels, chosen on an H200 (`benchmarks/tune_kernels.py` searches)."""

from dataclasses import dataclass, replace

from vllm_dms.arena.layout import ArenaLayout


@dataclass(frozen=True)
class Tuning:
    """Block sizes: speed only, never the result beyond rounding."""

    decode_block: int = 64  # slots per tile
    decode_rows: int = 8  # query heads per tile, the rest of them padding
    decode_warps: int = 4
    decode_stages: int = 2
    decode_registers: int | None = 168  # of a thread: so many programs then run at once
    programs_per_sm: int = 3  # of decode: as many as run at once
    programs: int = 0  # of decode in all, if not 0
    merge_block: int = 64  # most parts of a row that are merged together
    merge_registers: int = 64  # of a thread, for parts that decode merges itself: if rows are cut
    merge_cuts: float = 2.0  # into so many on average (the longest into several times as many)
    prefill_rows: int = 64  # (query token, head of the group) pairs per program
    prefill_block: int = 64  # keys per tile
    prefill_warps: int = 4
    prefill_stages: int = 3
    copy_block: int = 32  # tokens per program of the copying kernels


def default_tuning(layout: ArenaLayout) -> Tuning:
    tuning = Tuning()
    if layout.storage.name == "fp8":
        tuning = Tuning(decode_warps=2, programs_per_sm=6)
    elif layout.storage.name == "int4":
        # A warp by itself waits for no other: of four products and scales a tile has many steps.
        tuning = Tuning(
            decode_block=32, decode_warps=1, decode_stages=4, decode_registers=None,
            programs_per_sm=8, prefill_block=32,
        )  # fmt: skip
    elif layout.storage.dtype.itemsize == 4:  # twice the shared memory, and no tensor cores
        tuning = Tuning(decode_block=32, decode_registers=None)
    if layout.head_dim > 128:  # to fit the shared memory of GPUs before Hopper
        tuning = replace(tuning, prefill_block=32, prefill_stages=2, decode_registers=None)
    return tuning
