"""Run-time patches of vLLM, the hooks they need, and the diffs that would replace them."""

import inspect
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import vllm

from vllm_dms import compat

PATCHES = Path(__file__).parents[1] / "patches"
DIFFS = sorted(path.name for path in PATCHES.glob("*.diff"))
VLLM = Path(vllm.__path__[0])
RUN_TIME_PATCHES = ("patch_cache_dtype", "wrap_config_hook", "wrap_model_config")


def touched_files(diff):
    return re.findall(r"^\+\+\+ b/vllm/(\S+)", (PATCHES / diff).read_text(), re.M)


def tables():
    """Rows of cells of the two tables: diff, target, why, run-time patch, remove when; and what
    becomes of a diff in each version of vLLM."""
    text = (PATCHES / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    second = next(i for i, row in enumerate(rows) if row[0] == "diff" and i)
    return rows[2:second], rows[second:]


def ledger_rows():
    return tables()[0]


def fate(diff):
    """What the ledger says about a diff and the installed vLLM."""
    header, _, *rows = tables()[1]
    column = f"vLLM {vllm.__version__.split('+')[0]}"
    if column not in header:
        pytest.skip(f"patches/README.md has no column for {column}")
    row = next(row for row in rows if row[0] == f"`{diff}`")
    return row[header.index(column)]


def code_names(cell):
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("diff", DIFFS)
def test_a_diff_applies_to_the_installed_vllm_and_compiles(diff, tmp_path):
    files = touched_files(diff)
    assert files
    if fate(diff).startswith("not needed: "):
        pytest.skip(fate(diff))
    for name in files:
        (tmp_path / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(VLLM / name, tmp_path / "vllm" / name)
    done = subprocess.run(
        ["patch", "-p1", "--fuzz=0", "--directory", tmp_path, "--input", PATCHES / diff],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert fate(diff) == "applies" + " with offsets" * ("offset" in done.stdout), done.stdout
    for name in files:
        source = (tmp_path / "vllm" / name).read_text()
        compile(source, name, "exec")


def test_the_ledger_names_every_diff_with_the_files_it_touches():
    ledger = {code_names(row[0])[0]: code_names(row[1]) for row in ledger_rows()}
    assert ledger == {diff: touched_files(diff) for diff in DIFFS}


def test_the_ledger_says_what_becomes_of_every_diff_in_every_tested_version():
    header, _, *rows = tables()[1]
    assert header == ["diff", *(f"vLLM {version}" for version in compat.TESTED_VERSIONS)]
    assert {code_names(row[0])[0] for row in rows} == set(DIFFS)
    cells = [cell for row in rows for cell in row[1:]]
    assert all(re.match(r"applies( with offsets)?$|not needed: ", cell) for cell in cells)


def test_the_ledger_names_exactly_the_run_time_patches():
    patches = {
        name
        for name, function in inspect.getmembers(compat, inspect.isfunction)
        if "Remove when:" in (function.__doc__ or "")
    }
    named = {name for row in ledger_rows() for name in code_names(row[3])}
    assert named == patches == set(RUN_TIME_PATCHES)


@pytest.mark.parametrize("name", RUN_TIME_PATCHES)
def test_a_run_time_patch_says_what_it_is(name):
    doc = getattr(compat, name).__doc__
    assert re.findall(r"^    (\w[\w ]*):", doc, re.M) == [
        "Symptom",
        "Cause",
        "Change",
        "Remove when",
    ]


def test_a_patch_whose_target_was_renamed_names_it(monkeypatch):
    import vllm.config.cache as cache

    target = "KV_CACHE_DTYPES" if registers(cache) else "CacheDType"
    monkeypatch.delattr(cache, target)
    with pytest.raises(compat.MissingHookError, match=rf"vllm\.config\.cache:{target}"):
        compat.patch_cache_dtype()


def registers(cache):
    """Whether the patch finds vLLM's own way to add a value (0.33) there."""
    return hasattr(cache, "register_kv_cache_dtype")


def test_an_untested_version_is_warned_about_once(monkeypatch):
    warnings = []
    monkeypatch.setattr(compat.logger, "warning", lambda text, *args: warnings.append(text % args))
    assert compat.check_vllm_version()
    compat.check_vllm_version.cache_clear()
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99.0")
    assert not compat.check_vllm_version()
    assert not compat.check_vllm_version()
    compat.check_vllm_version.cache_clear()
    assert len(warnings) == 1
    assert "0.99.0" in warnings[0] and "0.32.0" in warnings[0]


def test_patching_the_cache_dtype_twice_adds_it_once():
    import vllm.config.cache as cache

    for _ in range(2):
        compat.patch_cache_dtype()
    values = cache.KV_CACHE_DTYPES if registers(cache) else typing.get_args(cache.CacheDType)
    assert [values.count(name) for name in ("dms", "dms_fp8", "dms_int4")] == [1, 1, 1]
    assert {"auto", "fp8", "bfloat16"} < set(values)


def test_the_dtype_is_registered_where_vllm_has_a_way_to(monkeypatch):
    import torch
    import vllm.config.cache as cache

    handlers, names = {}, ["auto"]

    def register_kv_cache_dtype(name):
        def decorate(handler_class):
            names.append(name)
            handlers[name] = handler_class()
            return handler_class

        return decorate

    monkeypatch.setattr(cache, "KV_CACHE_DTYPES", names, raising=False)
    monkeypatch.setattr(cache, "register_kv_cache_dtype", register_kv_cache_dtype, raising=False)
    for _ in range(2):
        compat.patch_cache_dtype()
    assert names == ["auto", "dms", "dms_fp8", "dms_int4"]
    assert handlers["dms"].name == "dms"
    assert handlers["dms"].torch_dtype() is torch.bfloat16
    assert handlers["dms_fp8"].quant_mode().name == "NONE"


class FakeConfig:
    def __init__(self, model):
        self.model_config, self.calls = model, []

    def try_verify_and_update_config(self):
        self.calls.append("vllm")


def test_the_config_hook_runs_first_for_every_model_and_is_wrapped_once(monkeypatch):
    import vllm.config.vllm as module

    class Config(FakeConfig):
        try_verify_and_update_config = FakeConfig.try_verify_and_update_config

    monkeypatch.setattr(module, "VllmConfig", Config)
    for _ in range(2):
        compat.wrap_config_hook(lambda config: config.calls.append("dms"))
    with_model, without_model = Config(model="any architecture"), Config(model=None)
    for config in (with_model, without_model):
        config.try_verify_and_update_config()
    assert with_model.calls == ["dms", "vllm"]
    assert without_model.calls == ["vllm"]


def test_arguments_are_prepared_on_a_copy_and_wrapped_once(monkeypatch):
    import vllm.engine.arg_utils as module

    class Args:
        model = "given"

        def create_model_config(self):
            return self.model

    def prepare(args):
        args.model += ", prepared"

    monkeypatch.setattr(module, "EngineArgs", Args)
    for _ in range(2):
        compat.wrap_model_config(prepare)
    args = Args()
    assert args.create_model_config() == "given, prepared" and args.model == "given"


def test_importing_the_package_imports_nothing_that_can_fail():
    # vLLM swallows errors of a plugin's import, so that such a plugin is silently absent.
    code = "import sys, vllm_dms; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_place_names_the_tested_versions():
    root, versions = PATCHES.parent, compat.TESTED_VERSIONS
    setup = (root / "scripts" / "setup.sh").read_text()
    assert f'supported="{" ".join(versions)}"' in setup
    header = "| | " + " | ".join(f"vLLM {version}" for version in versions) + " |"
    assert header in (root / "docs" / "compatibility.md").read_text()
    assert f"| vLLM | {' and '.join(versions)} " in (root / "README.md").read_text()
    low, high = versions[0], int(versions[-1].split(".")[1]) + 1
    assert f'cuda = ["vllm>={low},<0.{high}"]' in (root / "pyproject.toml").read_text()
