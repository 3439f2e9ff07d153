"""Times of kernels, and of copies beside them, in CUDA graphs."""

import itertools
import statistics
from collections.abc import Callable

import torch


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
