"""The wheel that `python -m build` makes is all that a machine with vLLM needs."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from fnmatch import fnmatch
from pathlib import Path

import pytest
from deployment_files import ROOT, wheel_pattern

import vllm_dms

pytestmark = pytest.mark.slow
# What the tests' own processes are told, and a user's are not.
TEST_SETTINGS = ("PYTHON", "VLLM_", "OMP_", "TRITON_", "CUBLAS_")
SOURCES = ("pyproject.toml", "README.md", "LICENSE")  # beside the package
SITE = ("site-packages", "dist-packages")


def run(*command, cwd, **kwargs):
    env = {k: v for k, v in os.environ.items() if not k.startswith(TEST_SETTINGS)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Of a copy: setuptools also takes what an earlier build left beside the sources."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vllm_dms", source / "vllm_dms", ignore=no_caches)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    (found,) = (source / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment's folder of programs, and an empty folder to start them from.

    The environment has the wheel, and sees the packages of the tests' own. A path in a .pth file is
    searched without running the .pth files there: by one of those the clone itself is installed.
    """
    venv, elsewhere = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=elsewhere)
    python = venv / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=elsewhere).strip())
    paths = [p for p in sys.path if Path(p).name in SITE]
    (site / "packages_of_the_tests.pth").write_text("\n".join(paths) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", wheel, cwd=elsewhere)
    return venv / "bin", elsewhere


def test_it_holds_the_package_file_by_file_and_its_license(wheel):
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "vllm_dms").rglob("*") if p.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"vllm_dms-{vllm_dms.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == files
    assert info + "licenses/LICENSE" in names


def test_its_name_is_the_one_that_the_dockerfile_installs(wheel):
    assert fnmatch(wheel.name, wheel_pattern())


def test_its_metadata_say_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "vllm-dms" and metadata["Version"] == vllm_dms.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (ROOT / "README.md").read_text()
    # What vLLM is, depends on the machine: an extra at most.
    assert all("extra ==" in needed for needed in metadata.get_all("Requires-Dist"))


def test_vllm_finds_the_plugin_once_and_it_is_the_installed_one(installed):
    programs, elsewhere = installed
    code = """
import importlib.metadata, json, vllm_dms
found = importlib.metadata.entry_points(group="vllm.general_plugins", name="dms")
print(json.dumps([[p.value for p in found], vllm_dms.__file__]))
"""
    plugins, file = json.loads(run(programs / "python", "-c", code, cwd=elsewhere))
    assert plugins == ["vllm_dms:register"]
    assert Path(file).is_relative_to(programs.parent)


def test_the_command_serves_the_embedded_checkpoint_from_anywhere(installed):
    """One server; its answer, and that it kept less than it read."""
    programs, elsewhere = installed
    command = programs / "vllm-dms"
    assert vllm_dms.__version__ in run(command, "--version", cwd=elsewhere)
    path = Path(run(command, "demo", "--path", cwd=elsewhere).strip())
    assert path.is_relative_to(programs.parent) and (path / "model.safetensors").is_file()
    logs = elsewhere / "logs"
    out = run(command, "demo", "--no-control", "--logs", logs, cwd=elsewhere, timeout=900)
    row = re.search(r"^ *DMS +([\d.]+) +(\d+) +([\d.]+)x +\d+$", out, re.M)
    assert row, out
    live, dense, compression = map(float, row.groups())
    assert dense > 3000 and compression > 6
    assert compression == pytest.approx(dense / live, rel=0.01)
    assert out.count("the answer is right") == 1
    assert [p.name for p in elsewhere.iterdir()] == ["logs"]
