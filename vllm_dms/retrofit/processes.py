"""Several processes, started by torchrun, that share the rows of every step.

Each holds the whole model, or a share of it (sharding), and takes every so many of a step's
forwards; gradients are added up, so every process takes the same step, which is one process's up to
the rounding of that sum.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    size: int = 1
    shard: bool = False

    @property
    def main(self) -> bool:
        """The one that speaks, writes and evaluates."""
        return self.rank == 0

    def say(self, text: str) -> None:
        if self.main:
            print(text, flush=True)

    def share(self, parts: list) -> list[tuple[int, torch.Tensor]]:
        """-> this process's parts, with their places among all"""
        return list(enumerate(parts))[self.rank :: self.size]

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Each becomes its sum over processes, in place and in one message."""
        tensors = list(tensors)
        if self.size == 1:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def agree(self, *values: float) -> list[float]:
        """The largest of each over processes; on the CPU, so no GPU is waited for."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()


@contextmanager
def joined() -> Iterator[tuple[Processes, torch.device]]:
    """-> this process among those that torchrun started, and its device"""
    cuda = torch.cuda.is_available()
    if not dist.is_torchelastic_launched():
        yield Processes(), torch.device("cuda" if cuda else "cpu")
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
