"""Every launch of the plugin twice, by the plugin's launcher and by Triton's own, which looks at
all arguments each time: `test_launch` runs this in a process of its own, with a library that only
listens for the driver.

    python tests/launches_of_plugin.py STORAGE [flash]

Prints one line of JSON: for each kernel how often both were compared, and what differed. Nothing is
compiled: each kernel that Triton would compile is a number that the driver is told.
"""

import json
import sys
from collections import Counter
from types import SimpleNamespace

import torch
from compile_kernels import NoGPU, make_ops, make_projection, no_flash
from launch_by_driver import listen_to_driver, sizes_of
from specializations import GROUP, HEAD_DIM, HEADS, batches, run, run_projection, run_snapshots
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from vllm_dms.backend.kernels.launch import Launcher, tensor_at
from vllm_dms.backend.triton_snapshots import TritonSnapshots


class Kernel:
    """As `CompiledKernel`, of no code: ``function`` is its number."""

    count = 0

    def __init__(self, src, options):
        Kernel.count += 1
        self.src, self.function = src, Kernel.count
        scratch = {"global_scratch_size": 0, "profile_scratch_size": 0}
        scratch |= {"global_scratch_align": 1, "profile_scratch_align": 1}
        shared = 16 * Kernel.count
        self.metadata = SimpleNamespace(**{**options.__dict__, **scratch, "shared": shared})
        self.packed_metadata = options.num_warps, options.num_ctas, shared
        self.run = CudaLauncher(src, self.metadata)
        self.sizes = sizes_of(src)

    def launch_metadata(self, *_):
        return None


def compare(launch, heard, compared, differ):
    """In place of ``launch``, a `Launcher.at`."""

    def launch_twice(launcher, grid, kind, near, *arguments):
        found = kind in launcher._compiled
        launch(launcher, grid, kind, near, *arguments)
        tensors = map(tensor_at, near, arguments)
        given = [*tensors, *arguments[len(near) :], *launcher._constants]
        launcher._kernel[grid](*given, **launcher._options)
        told = heard[:]
        heard.clear()
        name = launcher._kernel.fn.__name__
        compared[name] += found  # the first time both are Triton's
        if len(told) != 2 * (0 not in grid) or told[:1] != told[1:]:
            differ.append([name, str(kind), told])

    return launch_twice


def run_all(ops, dtype):
    """What is served: after a warm-up batches and copies of all kinds."""
    projection = make_projection(HEAD_DIM, dtype)
    ops.warm_up(dtype, None)
    ops.warm_up(dtype, projection)
    snapshots = TritonSnapshots(ops.state)
    snapshots.warm_up()
    run_snapshots(snapshots)
    for batch in batches():
        run(ops, batch, dtype)
        run(ops, batch, dtype, offset=8)
        wide = torch.zeros(batch.num_tokens, HEADS + 1, dtype=dtype)
        # Borrowed; an adapter's; another rank's beside it.
        alphas = None, wide[:, 1:].contiguous(), wide[:, 1:]
        run_projection(ops, batch, dtype, projection, alphas)


def main(storage, *flash):
    kernels, heard, compared, differ = {}, [], Counter(), []

    def compile_nothing(jit, key, signature, device, constexprs, options, attrs, warmup):
        kernel = Kernel(jit.ASTSource(jit, signature, constexprs, attrs), options)
        kernels[kernel.function] = jit.device_caches[device][0][key] = kernel
        return kernel

    listen_to_driver(heard, lambda function: kernels[function].sizes)
    driver.set_active(NoGPU(90))
    driver.active.utils = CudaUtils()
    JITFunction._do_compile = compile_nothing
    Launcher.at = compare(Launcher.at, heard, compared, differ)
    run_all(*make_ops(storage, HEAD_DIM, GROUP, True, 64, 2048, no_flash if flash else None))
    print(json.dumps({"compared": compared, "differ": differ}))


if __name__ == "__main__":
    main(*sys.argv[1:])
