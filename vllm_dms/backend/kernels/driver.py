"""A compiled kernel's launch by the CUDA driver itself.

Triton's own launcher takes all arguments apart at every launch, sixty of them, most of which never
change: 10 to 15 us on the host of `benchmarks/results/small_steps/launches_h100.json` (Triton 3.6).
Here those are written to memory once, and a launch adds the others. What the driver is told is the
same (`tests/test_launch.py` compares); with a version of Triton that has not been compared, Triton
launches. Triton's launch hooks (`knobs.runtime.launch_enter_hook`) are not called.
"""

import ctypes
import functools
import logging
import operator
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import triton

logger = logging.getLogger(__name__)

TRITON_VERSIONS = ("3.6", "3.7", "3.8")
CELL = 8  # bytes of an argument in memory; the driver reads as many as the kernel takes
FORMATS = {
    **{"i1": "?7x", "u1": "?7x", "i32": "i4x", "u32": "I4x", "i64": "q", "u64": "Q"},
    "fp32": "f4x",
}
MOST_SHARED_BYTES = 228 << 10  # above, Triton 3.8 passes an attribute more
OVERLAPS = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class Attribute(ctypes.Structure):
    """CUlaunchAttribute"""

    _fields_ = (("id", ctypes.c_uint64), ("value", ctypes.c_int * 16))


class Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@functools.cache
def launches_as_compared(version: str) -> bool:
    """Whether this Triton's launcher is known to tell the driver what `DriverLaunch` does: others
    may pass more. One that is not is named in the log."""
    compared = version.startswith(tuple(f"{v}." for v in TRITON_VERSIONS))
    if not compared:
        logger.warning(
            "Triton %s launches DMS's kernels itself: DMS launches them as Triton %s do, and has "
            "not been compared with others. Results are the same; each launch outside a CUDA graph "
            "costs the host more. How to add a version: docs/compatibility.md.",
            version, ", ".join(TRITON_VERSIONS),
        )  # fmt: skip
    return compared


@functools.cache
def driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def launch_function() -> Callable[[int, int, int, None], int]:
    """cuLaunchKernelEx"""
    function = driver().cuLaunchKernelEx
    function.argtypes = [ctypes.c_void_p] * 4
    return function


def name_of_error(number: int) -> str:
    """Of CUresult."""
    name = ctypes.c_char_p()
    driver().cuGetErrorName(number, ctypes.byref(name))
    return f"{(name.value or b'unknown').decode()} ({number})"


def flatten(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """Type and value of what lies in tuples of tuples, but for what is compiled in."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from flatten(kind, value)
        elif kind != "constexpr":
            yield kind, value


def format_of(kinds: Iterable[str]) -> str:
    """Of `struct`, each in a cell."""
    return "@" + "".join("Q" if kind[0] == "*" else FORMATS[kind] for kind in kinds)


class DriverLaunch:
    """``kernel``, as Triton compiled and loaded it, with constants that stay where they are."""

    def __init__(self, kernel: Any, arguments: tuple[Any, ...], constants: Any) -> None:
        """``arguments``: of this launch, numbers and addresses; ``constants``: those after them"""
        metadata, types = kernel.metadata, tuple(kernel.src.signature.values())
        not_passed = {
            "scratch memory": metadata.global_scratch_size or metadata.profile_scratch_size,
            "clusters": metadata.num_ctas > 1 or metadata.launch_cooperative_grid,
            "instrumentation": getattr(metadata, "instrumentation_mode", ""),
            "more shared memory": metadata.shared > MOST_SHARED_BYTES,
        }
        assert not any(not_passed.values()), (
            f"{kernel.src.name} needs what is not passed: {not_passed}"
        )
        self._kernel = kernel  # Triton 3.8 unloads one that nobody holds
        own = types[: len(arguments)]
        passed = [i for i, kind in enumerate(own) if kind != "constexpr"]
        self._pack = struct.Struct(format_of(own[i] for i in passed)).pack_into
        self._pick: Callable[[tuple[Any, ...]], Iterable[Any]] = operator.itemgetter(*passed)
        if len(passed) < 2:  # of one itemgetter makes no tuple
            self._pick = lambda values: [values[i] for i in passed]
        fixed = [*flatten(types[len(arguments) :], constants)]

        # Two more than Triton's signature has: its kernels' scratch.
        self._memory = ctypes.create_string_buffer(CELL * (len(passed) + len(fixed) + 2))
        values = struct.pack(format_of(kind for kind, _ in fixed), *(value for _, value in fixed))
        ctypes.memmove(ctypes.byref(self._memory, CELL * len(passed)), values, len(values))
        first, end = ctypes.addressof(self._memory), len(self._memory)
        self._cells = (ctypes.c_void_p * (end // CELL))(*range(first, first + end, CELL))

        overlaps = Attribute(OVERLAPS, (ctypes.c_int * 16)(1))
        self._config = Config(
            block=(32 * metadata.num_warps, 1, 1),
            shared_bytes=metadata.shared,
            attributes=ctypes.pointer(overlaps),
            num_attributes=int(metadata.launch_pdl),
        )
        active = triton.runtime.driver.active
        self._device, self._stream_of = active.get_current_device(), active.get_current_stream
        self._grid: tuple[int, int] | None = None
        self._stream: int | None = None
        self._launch, places = launch_function(), (self._config, self._cells)
        config, cells = map(ctypes.addressof, places)
        self._told = (config, kernel.function, cells, None)

    def __call__(self, grid: tuple[int, int], arguments: tuple[Any, ...]) -> None:
        """``arguments``: numbers and addresses, of the types that there were at first"""
        if 0 in grid:
            return
        self._pack(self._memory, 0, *self._pick(arguments))
        stream = self._stream_of(self._device)
        if grid != self._grid or stream != self._stream:
            self._grid, self._stream = grid, stream
            self._config.grid[:2], self._config.grid[2] = grid, 1
            self._config.stream = stream
        error = self._launch(*self._told)
        if error:
            raise RuntimeError(
                f"CUDA refuses to launch {self._kernel.src.name} with the grid {grid}: "
                f"{name_of_error(error)}. The fault may be an earlier kernel's: with "
                "CUDA_LAUNCH_BLOCKING=1 the error comes where it was made."
            )
