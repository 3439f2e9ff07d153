"""Launches that find their compiled kernel at once.

At every launch Triton looks at each argument, the constant ones included, to tell which compiled
kernel is meant: several times the cost of the launch, hundreds of times a step. Here it does so
once for each kind of arguments.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton


def addresses(constant: Any) -> Any:
    """``constant`` with the addresses of its tensors: a launch takes both, but asks what a tensor
    is."""
    if isinstance(constant, torch.Tensor):
        return constant.data_ptr()
    if isinstance(constant, tuple):
        parts = map(addresses, constant)
        return type(constant)(*parts) if hasattr(constant, "_fields") else tuple(parts)
    return constant


def kind_of(x: torch.Tensor) -> tuple[int, bool]:
    """What of ``x``, if its stride is passed beside it, a kernel is compiled for: Triton assumes no
    more than this. Dtypes are a worker's own, and always the same."""
    return x.stride()[0], x.data_ptr() % 16 == 0


class Launcher:
    """A kernel and its last arguments, which are the same in every launch."""

    def __init__(self, kernel: Any, *constants: Any, **options: Any) -> None:
        """``options``: num_warps and the like"""
        self._kernel, self._constants, self._options = kernel, constants, options
        self._addresses = addresses(constants)
        self._compiled: dict[Hashable, tuple[Callable, Any, Any, Callable]] = {}

    def __call__(self, grid: tuple[int, int], kind: Hashable, *arguments: Any) -> None:
        """``kind``: equal for arguments that Triton compiles the same kernel for"""
        found = self._compiled.get(kind)
        if found is None:
            self._find(grid, kind, arguments)
            return
        run, function, metadata, stream_of = found
        run(
            *grid, 1, stream_of(self.device), function, metadata, None, None, None,
            *arguments, *self._addresses,
        )  # fmt: skip

    def _find(self, grid: tuple[int, int], kind: Hashable, arguments: tuple[Any, ...]) -> None:
        """Launch as Triton does; it returns the kernel, under its interpreter None."""
        kernel = self._kernel[grid](*arguments, *self._constants, **self._options)
        if kernel is not None:
            active = triton.runtime.driver.active
            self.device = active.get_current_device()
            found = (kernel.run, kernel.function, kernel.packed_metadata, active.get_current_stream)
            self._compiled[kind] = found
