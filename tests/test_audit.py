"""The audit of another vLLM, on small sources of a host and of a plugin."""

import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import audit_vllm
import vllm_sources
from plugin_hooks import Plugin
from source_tree import SourceTree

OLD = {
    "vllm/__init__.py": "from vllm.version import *\n",
    "vllm/version.py": "VERSION = '1'\n",
    "vllm/pkg/__init__.py": "from .base import Base, Mixin\n",
    "vllm/pkg/base.py": """
import enum
from typing import Generic, TypeVar
T = TypeVar("T")
class Root:
    size: int
    def grow(self, by, *, at=0): return by
class Base(Generic[T], Root):
    def __init__(self, config, role=None): self.state = 1
    def start(self, first, second=1): "Doc."
    @property
    def ready(self): return False
    def renamed(self): pass
class Mixin: pass
class Kind(enum.Enum):
    CUSTOM = enum.auto()
class _Registry:
    def add(self, name): pass
registry = _Registry()
def helper(a, b=1): return a
""",
}
CHANGES = {
    "vllm/version.py": [("'1'", "'2'")],
    "vllm/pkg/base.py": [
        ('"Doc."', '"Other words."  # and a comment'),
        ("def renamed", "def new_name"),
        ("def grow(self, by, *, at=0)", "def grow(self, by, at=0, *, most=None)"),
        ("self.state = 1", "self.state = 1; self.mine = 2"),
        ("def helper(a, b=1)", "def helper(a, b=2)"),
    ],
}
PLUGIN = {
    "vllm_dms/__init__.py": "",
    "vllm_dms/hooks.py": "",
    "vllm_dms/parts.py": """
import vllm
from vllm import pkg
from vllm.pkg.base import helper, registry
class Own:
    def start(self, first, second=1): pass
class Derived(Own, pkg.Base[int], pkg.Mixin):
    size = 3
    ready = True
    def __init__(self, config):
        self.mine = vllm.VERSION
    def grow(self, by, *, at=0): registry.add("x")
    def renamed(self): pass
class Further(Derived):
    def start(self, first, second): pass
""",
}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def trees(tmp_path):
    """(old, new): the plugin beside two versions of its host."""
    changed = dict(OLD)
    for name, edits in CHANGES.items():
        for before, after in edits:
            assert before in changed[name]
            changed[name] = changed[name].replace(before, after)
    plugin = write(tmp_path / "plugin", PLUGIN)
    return [
        SourceTree(write(tmp_path / name, files), plugin)
        for name, files in {"old": OLD, "new": changed}.items()
    ]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("vllm:VERSION", "vllm.version:VERSION"),  # import *
        ("vllm.pkg:Base.size", "vllm.pkg.base:Root.size"),  # re-exported, declared in a base
        ("vllm.pkg.base:Kind.CUSTOM", "vllm.pkg.base:Kind.CUSTOM"),
        ("vllm.pkg.base:registry.add", "vllm.pkg.base:_Registry.add"),  # of an instance
        ("vllm:pkg", "vllm.pkg"),
        ("vllm.pkg:Base.gone", "None"),
        ("vllm.nowhere:Base", "None"),
    ],
)
def test_a_name_is_found_where_it_is_defined(trees, name, found):
    assert str(trees[0].find(name)) == found


def test_overrides_are_found_in_classes_mixins_and_on_self(trees):
    old = {(o.name, str(o.ours).partition(":")[2]) for o in Plugin(trees[0]).overrides}
    assert old == {
        ("start", "Own.start"),
        ("start", "Further.start"),
        ("size", "Derived.size"),
        ("ready", "Derived.ready"),
        ("__init__", "Derived.__init__"),
        ("grow", "Derived.grow"),
        ("renamed", "Derived.renamed"),
    }


def test_signatures_must_take_all_that_the_hosts_own_takes(trees):
    old, new = (Plugin(tree).wrong_signatures() for tree in trees)
    of_start = "vllm_dms.parts:Further.start overrides vllm.pkg.base:Base.start: "
    assert old == [of_start + "second is not optional"]
    of_grow = "vllm_dms.parts:Derived.grow overrides vllm.pkg.base:Base.grow: "
    assert [text.removeprefix(of_grow) for text in new if of_grow in text] == [
        "at is not its parameter 2",
        "most can't be given by name",
    ]


def test_a_method_that_only_the_plugin_calls_says_so(tmp_path):
    text = PLUGIN["vllm_dms/parts.py"].replace(
        "def start(self, first, second): pass",
        "def start(  # type: ignore[override]\n        self, other): pass",
    )
    write(tmp_path, {**OLD, **PLUGIN, "vllm_dms/parts.py": text})
    assert Plugin(SourceTree(tmp_path)).wrong_signatures() == []


def statuses(changes):
    return {change.name.partition(":")[2]: change.status for change in changes}


def test_hooks_overrides_and_imports_are_compared(trees, monkeypatch):
    hooks = ("Base.start", "Base.renamed", "Base.grow", "Base.size")
    monkeypatch.setattr(audit_vllm, "REQUIRED_HOOKS", {f"vllm.pkg:{h}": "why" for h in hooks})
    changes = audit_vllm.hook_changes(*trees)
    assert list(statuses(changes).values()) == ["same", "gone", "changed", "same"]
    assert changes[2].details == (
        "- grow(self, by, *, at=0)",
        "+ grow(self, by, at=0, *, most=None)",
    )
    of_overrides = statuses(audit_vllm.override_changes(*map(Plugin, trees)))
    assert of_overrides["Base.renamed"] == "gone"
    assert of_overrides["Base.mine"] == "new"  # set by the plugin, and now by its host too
    assert of_overrides["Base.ready"] == of_overrides["Base.start"] == "same"
    monkeypatch.setattr(audit_vllm, "ROOT", trees[0].roots[1])
    files = [trees[0].roots[1] / "vllm_dms" / "parts.py"]
    imports = audit_vllm.import_changes(*trees, files)
    assert {c.name: c.status for c in imports} == {
        "vllm": "same",
        "vllm:VERSION": "changed",
        "vllm.pkg": "same",
        "vllm.pkg:Base": "changed",
        "vllm.pkg:Mixin": "same",
        "vllm.pkg.base:helper": "changed",
        "vllm.pkg.base:registry": "same",
    }
    base = next(change for change in imports if change.name == "vllm.pkg:Base")
    assert base.details == ("without renamed", "with new_name", "changed: __init__")
    assert base.where == "vllm_dms/parts.py:7"
    text = audit_vllm.report("1 to 2", {"imports": imports}, ["a wrong one"])
    assert "| imports | 4 | 3 | 0 | 0 |" in text and "- a wrong one" in text


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """In place of the one on PyPI, beside an installed vLLM for CPU with one compiled part."""
    path, installed = tmp_path / "vllm-9.9.9.whl", tmp_path / "installed" / "vllm"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("vllm/__init__.py", "vllm/table.json", "vllm/_C.so", "other/x.py"):
            archive.writestr(name, "of the wheel")
    write(installed, {"_C.so": "of the CPU"})
    monkeypatch.setattr(vllm_sources, "installed_for_cpu", lambda: installed)
    monkeypatch.setattr(vllm_sources, "download", lambda version, folder: path)
    return path


def test_sources_of_a_version_are_importable_over_the_installed_compiled_parts(
    tmp_path, wheel, monkeypatch
):
    out = vllm_sources.get("9.9.9", tmp_path / "out")
    files = {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()}
    info = "vllm-9.9.9+cpu.dist-info/METADATA"
    assert files == {"vllm/__init__.py", "vllm/table.json", "vllm/_C.so", info, ".complete"}
    assert (out / "vllm" / "_C.so").read_text() == "of the CPU"
    assert "Version: 9.9.9+cpu" in (out / info).read_text()
    wheel.unlink()
    assert vllm_sources.get("9.9.9", out) == out  # without another download
    other = write(tmp_path / "other", {"mine.txt": ""})
    with pytest.raises(SystemExit, match="other files; remove it"):
        vllm_sources.get("9.9.9", other)


def test_a_machine_without_a_registry_is_told_so(monkeypatch, tmp_path, capsys):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching one\n")
    monkeypatch.setattr(vllm_sources.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit) as stop:
        vllm_sources.get("9.9.9", tmp_path / "out")
    assert stop.value.code == vllm_sources.NO_SOURCES
    assert "9.9.9 can't be downloaded from PyPI: ERROR: No match" in capsys.readouterr().err
