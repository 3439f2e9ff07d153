"""What the CUDA driver is told of a launch by Triton's own launcher and by the plugin's:
`test_launch` runs this in a process of its own, with a library that only listens for the driver.

Prints one line of JSON: launches, each as the two tell it, and the error of one that is refused.
"""

import ctypes
import json
import os
import sys
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from compile_kernels import NoGPU
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_dms.backend.kernels.driver import Config
from vllm_dms.backend.kernels.launch import Launcher

SIZES = {"i64": 8, "u64": 8, "i1": 1, "u1": 1}
LISTENER = ctypes.CFUNCTYPE(None, ctypes.POINTER(Config), ctypes.c_void_p,
                            ctypes.POINTER(ctypes.c_void_p))  # fmt: skip


class Sizes(NamedTuple):
    P: Any
    R: Any


class Pointers(NamedTuple):
    pages: Any
    number: Any
    one: Any
    live: Any


@triton.jit(do_not_specialize=["stride"])
def plain_kernel(x_ptr, OVERLAP: tl.constexpr, out_ptr, stride, wide):
    tl.store(out_ptr + stride, tl.load(x_ptr + wide))


@triton.jit(do_not_specialize=["layer"])
def nested_kernel(
    x_ptr, none_ptr, one, wide, layer, y_ptr, state, flag, scale, geo, inner, WARPS: tl.constexpr
):
    x = tl.load(x_ptr + layer + one + wide) * scale + geo.P + inner[1][0]
    if none_ptr is not None:
        x += tl.load(none_ptr)
    if flag:
        x += tl.load(state.pages + state.number + state.one) + inner[0]
    tl.store(y_ptr + geo.R, x)
    tl.store(state.live, 1)


class Driver(NoGPU):
    stream = 0

    def get_current_stream(self, device=None):
        return self.stream


def flat(types):
    for kind in types:
        if isinstance(kind, tuple):
            yield from flat(kind)
        elif kind != "constexpr":
            yield 8 if kind[0] == "*" else SIZES.get(kind, 4)


def sizes_of(source):
    """Bytes of a kernel's arguments. Whatever else is asked for, Triton passes scratch that has no
    bytes."""
    return [*flat(source.signature.values()), 8, 8]


def listen_to_driver(heard, sizes_of):
    """Put in ``heard`` what the driver is told; ``sizes_of`` a function: bytes of its arguments."""
    sys.setdlopenflags(os.RTLD_LAZY)  # of the driver's functions there are a few

    def listen(config, function, cells):
        c = config.contents
        attributes = [(c.attributes[i].id & 0xFFFFFFFF, c.attributes[i].value[0])
                      for i in range(c.num_attributes)]  # fmt: skip
        about = (*c.grid, *c.block, c.shared_bytes, c.stream or 0, function)
        sizes = enumerate(sizes_of(function))
        heard.append([about, attributes, [ctypes.string_at(cells[i], n).hex() for i, n in sizes]])

    listen_to_driver.listener = LISTENER(listen)  # kept, as the library does not
    ctypes.CDLL("libcuda.so.1").listen(listen_to_driver.listener)


def main():
    heard, sizes = [], []
    listen_to_driver(heard, lambda function: sizes)
    active = Driver(90)
    driver.set_active(active)
    active.utils = CudaUtils()
    compiled = []

    def compile_only(kernel, grid):
        def launch(*args, **kwargs):
            compiled.append(kernel.warmup(*args, grid=grid, **kwargs))
            compiled[-1].function = 0x7654321
            return compiled[-1]

        return launch

    JITFunction.__getitem__ = compile_only
    x, y, state = torch.zeros(64), torch.zeros(64), torch.zeros(8, dtype=torch.int32)
    pointers, geometry = Pointers(state, 5, 1, state[4:]), Sizes(tl.constexpr(8), tl.constexpr(3))
    constants = (pointers, True, 0.3, geometry, (7, (1 << 33, 1)), 8)
    nested = Launcher(nested_kernel, *constants, num_warps=8, launch_pdl=True)
    plain = Launcher(plain_kernel, num_warps=2)
    for launcher, arguments, others in (
        (nested, (x, None, 1, 1 << 40, 16, y), (y, None, 1, 3 << 40, -1, x)),
        (plain, (x, True, y, 16, 1 << 40), (y, True, x, -3, 5 << 40)),
    ):
        launcher((1, 1), "kind", *arguments)
        kernel = compiled[-1]
        own = CudaLauncher(kernel.src, kernel.metadata)
        sizes[:] = sizes_of(kernel.src)
        for grid, stream, given in (((5, 2), 0, others), ((5, 2), 0, arguments),
                                    ((7, 1), 0x1234567890, others)):  # fmt: skip
            active.stream = stream
            launcher(grid, "kind", *given)
            own(*grid, 1, stream, kernel.function, kernel.packed_metadata, None, None, None,
                *given, *launcher._constants)  # fmt: skip
        launcher((0, 2), "kind", *others)
        own(0, 2, 1, 0, kernel.function, kernel.packed_metadata, None, None, None, *others,
            *launcher._constants)  # fmt: skip
    launches = list(zip(heard[1::2], heard[::2], strict=True))
    ctypes.CDLL("libcuda.so.1").refuse()
    try:
        plain((5, 2), "kind", *others)
    except RuntimeError as error:
        print(json.dumps({"launches": launches, "refused": str(error)}))


if __name__ == "__main__":
    main()
