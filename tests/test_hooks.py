"""All that the plugin overrides of vLLM is there under its name, with a signature that fits."""

import functools
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import vllm

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from plugin_hooks import Plugin, belongs
from source_tree import SourceTree

import vllm_dms
from vllm_dms import compat
from vllm_dms.hooks import GRAFTED, OVERRIDDEN, REQUIRED_HOOKS

ROOT = Path(__file__).parents[1]
VLLM = Path(vllm.__path__[0]).parent
LISTED = [hook for hook in REQUIRED_HOOKS if hook.rpartition(".")[0] in OVERRIDDEN]
MANAGER = "v1/core/single_type_kv_cache_manager.py"
# File of vLLM, a change of it, and what then is wrong.
RENAMED = {
    "a method": (MANAGER, "def get_num_blocks_to_allocate", "def blocks_to_allocate"),
    "a property": ("v1/kv_cache_interface.py", "def uses_slot_mapping", "def has_slot_mapping"),
    "a class attribute": ("v1/attention/backend.py", "_cudagraph_support:", "_graph_support:"),
    "a declared attribute": ("v1/attention/backend.py", "    num_heads: int\n", "    heads: int\n"),
    "a field": ("v1/core/sched/output.py", "has_sync_kv_loads:", "has_kv_loads:"),
}
SIGNATURES = {
    "a parameter more": (
        (MANAGER, "apply_admission_cap: bool = False,", "cap: bool = False, more: int = 0,"),
        "DMSManager.get_num_blocks_to_allocate overrides",
    ),
    "another order": (
        (MANAGER, "self, request_id: str, num_tokens: int, num_tokens_main_model: int",
         "self, num_tokens: int, request_id: str, num_tokens_main_model: int"),
        "request_id is not its parameter 2",
    ),
    "a method that was a property": (
        ("v1/kv_cache_interface.py",
         "    @property\n    def uses_slot_mapping", "    def uses_slot_mapping"),
        "it is of kind 'attribute', in vLLM 'method'",
    ),
}  # fmt: skip


@functools.cache
def installed(*roots):
    return Plugin(SourceTree(*roots, VLLM, ROOT), GRAFTED)


def changed(folder, name, old, new):
    """The installed vLLM but for one file, in which `old` is replaced."""
    source = (VLLM / "vllm" / name).read_text()
    assert old in source
    path = folder / "vllm" / name
    path.parent.mkdir(parents=True)
    path.write_text(source.replace(old, new))
    return installed(folder)


def missing(plugin):
    return [hook for hook in REQUIRED_HOOKS if plugin.tree.find(hook) is None]


def test_every_required_hook_is_there():
    assert missing(installed()) == []
    for hook in REQUIRED_HOOKS:
        compat.resolve_hook(hook)
    compat.check_hooks()


def test_what_is_overridden_is_among_the_required_hooks():
    """Renamed in vLLM, it would no longer be called."""
    assert installed().unlisted(REQUIRED_HOOKS) == []


def test_what_is_listed_as_overridden_is():
    assert installed().stale(LISTED) == []


def test_overriding_methods_take_what_vllm_passes():
    assert installed().wrong_signatures() == []


@pytest.mark.parametrize("dialect", ["nvidia-borrowed", "nvidia-adapter"])
def test_no_class_of_the_plugin_escapes(checkpoint, make_engine, dialect):
    """A class that exists has its class statement, which is found, or was grafted as listed."""
    for module in pkgutil.walk_packages(vllm_dms.__path__, "vllm_dms."):
        importlib.import_module(module.name)
    make_engine(checkpoint(dialect), kv_cache_dtype="dms")
    stated = {str(cls) for cls in installed().classes()}
    for cls in alive_classes():
        if name_of(cls) not in stated:
            ours, stock = cls.__bases__
            assert name_of(stock) in GRAFTED[name_of(ours)], cls
    assert len(stated) > 8


def alive_classes():
    """Those of the plugin that have a base in vLLM."""
    pending, found = [object], set()
    while pending:
        for cls in type.__subclasses__(pending.pop()):
            if cls not in found:
                found.add(cls)
                pending.append(cls)
    return [
        cls
        for cls in found
        if belongs(str(cls.__module__), "vllm_dms")
        and any(belongs(base.__module__, "vllm") for base in cls.__mro__)
    ]


def name_of(cls):
    return f"{cls.__module__}:{cls.__qualname__}"


@pytest.mark.parametrize("what", RENAMED)
def test_a_renamed_hook_is_missed(tmp_path, what):
    assert len(missing(changed(tmp_path, *RENAMED[what]))) == 1


@pytest.mark.parametrize("what", SIGNATURES)
def test_a_changed_signature_is_named(tmp_path, what):
    change, problem = SIGNATURES[what]
    found = changed(tmp_path, *change).wrong_signatures()
    assert found and any(problem in text for text in found)


def test_a_hook_less_on_the_list_is_named():
    plugin = installed()
    for hook in LISTED:
        (text,) = plugin.unlisted(set(LISTED) - {hook})
        assert text.startswith(plugin.defining_class(hook))


def test_a_hook_that_nothing_overrides_is_named():
    hook = "vllm.v1.kv_cache_interface:AttentionSpec.storage_block_size"
    assert installed().stale([*LISTED, hook]) == [f"{hook}: listed as overridden, but it is not"]


def test_the_error_names_each_hook_that_is_gone():
    gone = "vllm.config.cache:CacheConfig.no_such_attribute"
    moved = "vllm.no_such_module:anything"
    with pytest.raises(compat.MissingHookError) as error:
        compat.check_hooks({**REQUIRED_HOOKS, gone: "purpose one", moved: "purpose two"})
    message = str(error.value)
    assert f"{gone} (purpose one)" in message and f"{moved} (purpose two)" in message
    assert vllm.__version__ in message and "kv_transfer_config" not in message


def test_checking_imports_no_layer_and_no_model():
    code = (
        "import sys; from vllm_dms import compat; compat.check_hooks()\n"
        "print([m for m in sys.modules if m.startswith('vllm.model_executor.layers.attention')"
        " or m.startswith('vllm.model_executor.models.llama')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "[]"
