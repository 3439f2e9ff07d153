"""Times of kernels, and of copies beside them, in CUDA graphs."""

import itertools
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from certificate import certificate, command_and_date


def time_graph(step: Callable[[], None], replays: int = 30) -> float:
    """Median microseconds of one replay of ``step``, captured after a warm-up."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    spans = (a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return statistics.median(spans) * 1000


def time_flash(heads: int, group: int, dim: int, chunk: int, stored: int) -> float | None:
    """Microseconds of a layer's dense causal attention by the FlashAttention that stock vLLM uses
    on this GPU, bfloat16; None if it has none."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    version = get_flash_attn_version(head_size=dim)
    if version is None:
        return None
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    query = torch.randn(chunk, heads * group, dim, **kind)
    key, value = (torch.randn(stored + chunk, heads, dim, **kind) for _ in "kv")
    of_query, of_key = (
        torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (chunk, stored + chunk)
    )
    output = torch.empty_like(query)

    def attend() -> None:
        flash_attn_varlen_func(
            query, key, value, chunk, of_query, stored + chunk, of_key, causal=True, out=output,
            fa_version=version,
        )  # fmt: skip

    return time_graph(attend, replays=20)


def time_copy(num_bytes: float, copies: int) -> float:
    """Microseconds of a device-to-device copy of so many bytes, read and written ones counted,
    after another one; ``copies`` of them, all of other memory, are in the graph.

    By an elementwise kernel: in a graph, `copy_` is left to a copy engine, which is slower.
    """
    pairs = torch.randn(copies, 2, max(int(num_bytes) // 8, 1), device="cuda")
    return time_graph(lambda: [torch.neg(a, out=b) for a, b in pairs]) / copies


def copy_bandwidth() -> float:
    """Bytes per second of a copy so large that its start does not count."""
    return (1 << 32) / (time_copy(1 << 32, 1) * 1e-6)


def write_rows(path: Path, commit: str | None, rows: Iterable[dict[str, Any]]) -> None:
    """A kernel benchmark's JSON and a line of output, at every row."""
    report: dict[str, Any] = {**command_and_date(), **certificate(commit)}
    report |= {"copy_bytes_per_s": (copy := copy_bandwidth()), "rows": []}
    for row in rows:
        if "bytes_per_s" in row:
            row["share_of_copy"] = round(row["bytes_per_s"] / copy, 3)
        report["rows"].append(row)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(row), flush=True)
