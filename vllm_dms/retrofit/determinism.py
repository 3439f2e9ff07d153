"""What torch must be told for the same inputs to give the same bits, on a GPU too."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(enabled: bool = True) -> Iterator[None]:
    """Inside, an operation gives the same bits every time, on one kind of GPU and one torch, or
    raises.

    Warnings would not do: only where errors are asked for do flash attention's gradients add up in
    a fixed order, does memory-efficient attention leave the keys of a head to one block, and is
    cuDNN's attention passed over.
    """
    if not enabled:
        yield
        return
    # cuBLAS and torch read it once, at the process's first matrix product on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    mode = torch.get_deterministic_debug_mode()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = filled
