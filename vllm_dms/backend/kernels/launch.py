"""Launches that find their compiled kernel at once.

At every launch Triton looks at each argument, the constant ones included, to tell which compiled
kernel is meant: several times the cost of the launch, hundreds of times a step. Here it does so
once for each kind of arguments, and what it compiled is then launched by `kernels.driver`, if that
knows this version of Triton.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton

from vllm_dms.backend.kernels.driver import DriverLaunch, launches_as_compared


def addresses(constant: Any) -> Any:
    """``constant`` with the addresses of its tensors."""
    if isinstance(constant, torch.Tensor):
        return constant.data_ptr()
    if isinstance(constant, tuple):
        parts = map(addresses, constant)
        return type(constant)(*parts) if hasattr(constant, "_fields") else tuple(parts)
    return constant


class Rows(NamedTuple):
    """Of a matrix in memory, as kernels take it: an address and a stride."""

    near: torch.Tensor  # in whose memory it is, and of whose dtype
    address: int
    stride: int  # elements from a row to the next
    kind: (
        Hashable  # what of both Triton may compile for; dtypes are a worker's own, always the same
    )


def rows_at(near: torch.Tensor, address: int, stride: int) -> Rows:
    return Rows(near, address, stride, (stride, address % 16 == 0))


def tensor_at(near: Any, address: Any) -> Any:
    """What Triton takes for ``address``, in the memory of the tensor ``near`` and of its dtype."""
    if not isinstance(near, torch.Tensor):
        return address
    offset = (address - near.data_ptr()) // near.element_size()
    return near.as_strided((1,), (1,), near.storage_offset() + offset)


class Launcher:
    """A kernel and its last arguments, which are the same in every launch."""

    def __init__(self, kernel: Any, *constants: Any, **options: Any) -> None:
        """``options``: num_warps and the like"""
        self._kernel, self._constants, self._options = kernel, constants, options
        self._compiled: dict[Hashable, DriverLaunch] = {}

    def __call__(self, grid: tuple[int, int], kind: Hashable, *arguments: Any) -> None:
        """``kind``: equal only for arguments that Triton compiles the same kernel for"""
        found = (x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments)
        self.at(grid, kind, arguments, *found)

    def at(
        self, grid: tuple[int, int], kind: Hashable, near: tuple[Any, ...], *arguments: Any
    ) -> None:
        """With addresses in place of tensors, so that none has to be made; ``near``: tensors in
        whose memory the first arguments are, or None."""
        launch = self._compiled.get(kind)
        if launch is None:
            self._find(grid, kind, near, arguments)
        else:
            launch(grid, arguments)

    def _find(
        self, grid: tuple[int, int], kind: Hashable, near: tuple[Any, ...], arguments: Any
    ) -> None:
        """Launch as Triton does; it returns the kernel, under its interpreter None."""
        tensors = [tensor_at(*pair) for pair in zip(near, arguments, strict=False)]
        given = (*tensors, *arguments[len(tensors) :])
        kernel = self._kernel[grid](*given, *self._constants, **self._options)
        if kernel is not None and launches_as_compared(triton.__version__):
            constants = addresses(self._constants)
            self._compiled[kind] = DriverLaunch(kernel, arguments, constants)
