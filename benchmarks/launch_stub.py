"""Launches without a GPU: nothing is compiled and nothing launched, all that the plugin does for a
launch in Python is done."""

from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver as triton_driver
from triton.runtime.jit import JITFunction

from vllm_dms.backend.kernels import driver


class NoDriver:
    """What Triton, and a launch after the first, ask a driver for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _do_nothing(*args: Any) -> int:
    return 0


def _compile_nothing(kernel: JITFunction, key: Any, signature: dict[str, Any], *_: Any) -> Any:
    sizes = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "shared")
    metadata = SimpleNamespace(**dict.fromkeys(sizes, 0), num_ctas=1, num_warps=4, launch_pdl=True)
    kernel.device_caches[0][0][key] = compiled = SimpleNamespace(
        src=SimpleNamespace(signature=signature), metadata=metadata, function=0,
        run=_do_nothing, packed_metadata=(), launch_metadata=_do_nothing,
    )  # fmt: skip
    return compiled


def install() -> None:
    """For the rest of this process."""
    triton_driver.set_active(NoDriver())
    JITFunction._do_compile = _compile_nothing
    driver.launch_function = lambda: _do_nothing
