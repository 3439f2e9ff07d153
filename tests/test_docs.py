"""README and docs/ name only what exists, and README stays short."""

import re
from pathlib import Path

import pytest

from vllm_dms.config import ADAPTER, ADAPTER_REVISION, OVERRIDES
from vllm_dms.retrofit.arguments import build_parser

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
PAGES = [
    README,
    *DOCS,
    *(ROOT / p for p in ("benchmarks", "benchmarks/results", "examples", "patches")),
]
PAGES = [page / "README.md" if page.is_dir() else page for page in PAGES]


def links(page):
    """-> (file, heading or "") of each link to a file here."""
    found = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text())
    return [((page.parent / path).resolve() if path else page, anchor) for path, anchor in found]


def anchors(page):
    """Its headings as GitHub names them in a link."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def keys(page):
    """Names in the first column of its tables of settings."""
    rows = re.findall(r"^\| key \|.*\n(?:\|.*\n)*", page.read_text(), re.M)
    assert rows, f"{page} has no table of settings"
    cells = re.findall(r"^\| (`[^|]*)\|", "".join(rows), re.M)
    return re.findall(r"`(\w+)`", "".join(cells))


EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))
OTHERS = [ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *EXAMPLES]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for path, anchor in links(page):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"


def test_readme_leads_to_every_page():
    assert {*PAGES} - {README} <= {path for path, _ in links(README)}


def test_examples_lead_to_their_own():
    assert {*EXAMPLES} <= {path for path, _ in links(ROOT / "examples" / "README.md")}


def test_every_setting_is_described_once():
    described = keys(ROOT / "docs" / "settings.md")
    assert sorted(described) == sorted((*OVERRIDES, ADAPTER, ADAPTER_REVISION))
    assert set(keys(README)) <= set(described)


def test_options_of_the_retrofit_exist():
    known = {option for action in build_parser()._actions for option in action.option_strings}
    text = (ROOT / "docs" / "retrofit.md").read_text()
    of_others = {"--nproc-per-node", "--kv-cache-dtype", "--additional-config", "--help"}
    named = set(re.findall(r"(?<=[ `])--[a-z][a-z-]*", text)) - of_others
    assert len(named) > 5 and named <= known


def test_readme_is_read_in_three_minutes():
    before, _, rest = README.read_text().partition("<!-- results:begin -->")
    results, _, after = rest.partition("<!-- results:end -->")
    assert len((before + results + after).splitlines()) <= 170
    long = [line for line in (before + after).splitlines() if len(line) > 120]
    assert not long
