"""A launch by the driver is the one that Triton's own launcher makes, to the byte."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from test_compile import KERNELS

from vllm_dms.backend.kernels import launch
from vllm_dms.backend.kernels.driver import DriverLaunch, launches_as_compared
from vllm_dms.backend.triton_store import TritonStore

# Of the driver, what launchers call.
LIBRARY = """
#include <stdint.h>
static void (*told)(const void *, void *, void **);
void listen(void (*listener)(const void *, void *, void **)) { told = listener; }
static int answer = 0;
void refuse(void) { answer = 700; }
int cuLaunchKernelEx(const void *config, void *function, void **cells, void **extra) {
  told(config, function, cells);
  return answer;
}
int cuGetErrorName(int number, const char **name) { *name = "CUDA_ERROR_OF_TEST"; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuPointerGetAttribute(uint64_t *out, int which, uint64_t pointer) { *out = pointer; return 0; }
"""


needs_compiler = pytest.mark.skipif(
    shutil.which("cc") is None, reason="needs a C compiler, as Triton does"
)


@pytest.fixture
def run_script(tmp_path):
    """What a script prints, in a process where `LIBRARY` is the driver."""
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text(LIBRARY)
    shared = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1")
    subprocess.run(["cc", *shared, "-o", library, source], check=True)
    (tmp_path / "libcuda.so").symlink_to(library)
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    env.pop("TRITON_INTERPRET", None)

    def run(name, *arguments):
        command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


@needs_compiler
def test_the_driver_is_told_what_triton_tells_it(run_script):
    found = run_script("launch_by_driver.py")
    launches = found["launches"]
    assert len(launches) == 6
    for by_triton, by_plugin in launches:
        assert by_plugin == by_triton
    (about, attributes, values), _ = launches[0]
    assert about[:6] == [5, 2, 1, 256, 1, 1] and attributes == [[6, 1]] and len(values) == 13
    assert launches[2][0][0][7] == 0x1234567890 and launches[3][0][1] == []
    refused = r"launch plain_kernel with the grid \(5, 2\): CUDA_ERROR_OF_TEST \(700\)"
    assert re.search(refused, found["refused"])


@needs_compiler
@pytest.mark.parametrize("how", [["bfloat16"], ["int4", "flash"]], ids=" ".join)
def test_each_kernel_is_launched_as_triton_would_in_batches_of_all_kinds(run_script, how):
    """The same kernel with the same arguments, whatever came first."""
    found = run_script("launches_of_plugin.py", *how)
    assert found["differ"] == []
    others = {"alpha_kernel"}  # launched by Triton
    others.add("prefill_kernel" if "flash" in how else "prefill_stored_kernel")
    assert {*found["compared"]} >= KERNELS - others
    assert all(count > 20 for count in found["compared"].values())


@pytest.mark.parametrize(
    ("version", "known"), [("3.6.0", True), ("3.8.0+git", True), ("3.60.0", False), ("4.0", False)]
)
def test_a_triton_that_was_not_compared_launches_itself_and_is_named(
    version, known, monkeypatch, caplog
):
    launches, by_driver = [], []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **options: launches.append((grid, given, options)) or "compiled"

    class ByDriver:
        def __init__(self, *about):
            by_driver.append(about)

        def __call__(self, grid, arguments):
            by_driver.append((grid, arguments))

    launches_as_compared.cache_clear()
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(launch, "DriverLaunch", ByDriver)
    x = torch.zeros(4)
    launcher = launch.Launcher(Kernel(), 7, num_warps=2)
    for number in (5, 6):
        launcher((1, 2), "kind", x, number)
    assert len(launches) == (1 if known else 2) and len(by_driver) == (2 if known else 0)
    for (grid, (tensor, number, constant), options), expected in zip(
        launches, (5, 6), strict=False
    ):
        assert tensor.data_ptr() == x.data_ptr() and tensor.dtype == x.dtype
        assert (grid, number, constant, options) == ((1, 2), expected, 7, {"num_warps": 2})
    assert [version in record.message for record in caplog.records] == ([] if known else [True])
    launches_as_compared.cache_clear()


@pytest.mark.parametrize(
    ("field", "value"), [("num_ctas", 2), ("shared", 229 << 10), ("instrumentation_mode", "gsan")]
)
def test_a_kernel_that_needs_more_than_is_passed_is_refused(field, value):
    sizes = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "shared")
    metadata = SimpleNamespace(**{**dict.fromkeys(sizes, 0), "num_ctas": 1, field: value})
    kernel = SimpleNamespace(metadata=metadata, src=SimpleNamespace(name="x_kernel", signature={}))
    with pytest.raises(AssertionError, match="x_kernel needs what is not passed"):
        DriverLaunch(kernel, (), ())


def test_rows_of_another_device_are_refused():
    store = SimpleNamespace(head_dim=16, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="device of key is meta"):
        TritonStore._rows(store, "key", torch.zeros(3, 2, 16, device="meta"), 2)
