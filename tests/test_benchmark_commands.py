"""The benchmarks' pages give commands that their scripts understand, and tell of every result."""

import argparse
import json
import re
import runpy
import shlex
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGES = [BENCHMARKS / "README.md", BENCHMARKS / "results" / "README.md"]


class UnderstoodError(Exception):
    """The script has read its arguments."""


def command_lines(page):
    """Of a page's indented blocks, words as a shell would see them."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines]


def options(page):
    """A page's options in running text and tables, with what their script needs before them."""
    text = re.sub(r"\n *", " ", page.read_text())
    for words in map(shlex.split, re.findall(r"`(--[^`]+ [^`]+)`", text)):
        if "--workloads" in words or "--pool-gib" in words:
            pool = [] if "--pool-gib" in words else ["--pool-gib", "1"]
            load = [] if "--workloads" in words else ["--workloads", "decode-8k"]
            yield [
                "benchmarks/bench_serving.py",
                "--model",
                "M",
                "--out",
                "O",
                *pool,
                *load,
                *words,
            ]
        elif "--samples" in words:
            text = ["B", "--adapter", "A", "--text", "T", "--out", "O"]
            yield ["benchmarks/eval_text.py", *text, *words]
        elif "--prompts" in words:
            yield ["benchmarks/eval_quality.py", *words]


def commands():
    for page in PAGES:
        yield from (words[1:] for words in command_lines(page) if words[:1] == ["python"])
        yield from options(page)


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_is_understood_by_its_script(monkeypatch, words):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise UnderstoodError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    module = words[0] == "-m"
    script = "" if module else str(ROOT / words[0])
    monkeypatch.setattr(sys, "argv", [script, *words[1 + module :]])
    monkeypatch.setattr(sys, "path", [str(Path(script).parent), str(ROOT), *sys.path])
    with pytest.raises(UnderstoodError):
        if module:
            runpy.run_module(words[1], run_name="__main__")
        else:
            runpy.run_path(script, run_name="__main__")


def test_every_script_is_in_the_table():
    told = re.findall(r"^\| `([\w/]+\.py)` \|", PAGES[0].read_text(), re.M)
    texts = {p.relative_to(BENCHMARKS).as_posix(): p.read_text() for p in BENCHMARKS.rglob("*.py")}
    parses = re.compile(r"(argparse\.ArgumentParser|make_parser)\(")
    scripts = [p for p, text in texts.items() if parses.search(text) and '"__main__"' in text]
    assert sorted(told) == sorted(scripts)


def test_every_result_is_there_and_is_told_of():
    results = BENCHMARKS / "results"
    pages = [page.read_text() for page in (*PAGES, *(ROOT / "docs").glob("*.md"))]
    text = "".join([*pages, (ROOT / "examples" / "smollm2" / "README.md").read_text()])
    named = re.findall(r"`((?:results/)?[\w/]+(?:\.json|/))`", PAGES[1].read_text())
    assert len(named) > 5
    assert not [name for name in named if not (results / name).exists()]
    published = json.loads((results / "published.json").read_text())
    for path in results.iterdir():
        if path.suffix == ".json" and path.stem not in published:
            assert path.name in text or path.stem.split("_")[0] + "_*" in text, path
