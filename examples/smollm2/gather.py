"""Text to train and to judge a retrofit with, from the documentation in Debian packages.

python examples/smollm2/gather.py WORK

Fetches the packages with apt-get (any Debian or Ubuntu that has them), unpacks them under
WORK/packages without installing them, and writes WORK/train.jsonl and WORK/heldout.jsonl: a
document a line, each document in one of the two. Every fourth training document is a chat, so that
the template's tokens are seen as well. Nothing but the packages' versions decides a byte.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# package -> (folder, files to leave out: indexes, changelogs, tables of numbers)
PACKAGES = {
    "python3.11-doc": (
        "usr/share/doc/python3.11/html",
        r"genindex|search\.|changelog|py-modindex|/contents\.|_static|distutils/",
    ),
    "postgresql-doc-15": (
        "usr/share/doc/postgresql-doc-15/html",
        r"bookindex|/index\.|/release-|features-sql",
    ),
    "python-django-doc": (
        "usr/share/doc/python-django-doc/html",
        r"genindex|search\.|py-modindex|_modules|/contents\.|_static",
    ),
    "sqlite3-doc": (
        "usr/share/doc/sqlite3",
        r"keyword_index|hlr\d|doclist|sitemap|/session/|requirements|syntax/|releaselog/",
    ),
    "apache2-doc": (
        "usr/share/doc/apache2-doc/manual/en",
        r"sitemap|quickreference|convenience|/index\.",
    ),
    "llvm-14-doc": ("usr/share/doc/llvm-14-doc/html", r"genindex|search\.|_static|AMDGPU"),
    "debian-handbook": ("usr/share/doc/debian-handbook/html/en-US", r"/index\.|/ix01"),
    "debian-reference-en": ("usr/share/debian-reference", r"/index\."),
    "git-doc": ("usr/share/doc/git-doc", r"RelNotes|/index\."),
    "jargon-text": ("usr/share/doc/jargon-text", r"changelog|copyright"),
}
SHORTEST = 800  # characters; below it a page is a stub
# A held-out document fills most of a row of 8,192 tokens, and no source gives much of the whole.
HELD_OUT_SIZES = range(12_000, 90_000)
HELD_OUT_A_SOURCE = 160_000
CHAPTER = 60_000  # a book in one file is cut at about so many characters

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
NARROW = {"dd", "div", "dt", "li", "tr"}  # a line break beside them, beside other blocks two
BLOCKS = NARROW | {"article", "blockquote", "center", "dl", "ol", "p", "pre", "section", "table"}
BLOCKS |= {"ul", "h1", "h2", "h3", "h4", "h5", "h6"}
HIDDEN_TAGS = {"button", "footer", "form", "head", "nav", "script", "select", "style", "svg"}
HIDDEN_MARKS = re.compile(
    r"sphinxsidebar|related|footer|navheader|navfooter|headerlink|toc|breadcrumb|search|menu"
    r"|preamble|page-header|toplang|bottomlang|comments|nav-|copyright|fancy|permalink"
)


class Reader(HTMLParser):
    """The text of a page, without what surrounds it on every page."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[tuple[str, bool]] = []

    def hidden(self) -> bool:
        return any(hides for _, hides in self.open)

    def handle_starttag(self, tag, attrs):
        if tag in VOID:
            self.parts += ["\n"] if tag == "br" else []
            return
        marks = " ".join(value or "" for name, value in attrs if name in ("class", "id"))
        marked = tag in ("a", "div", "p", "ul") and HIDDEN_MARKS.search(marks)
        self.open.append((tag, tag in HIDDEN_TAGS or bool(marked)))
        if not self.hidden():
            self.parts += [self.gap(tag)] if tag in BLOCKS else []
            self.parts += {"li": ["- "], "td": ["  "], "th": ["  "]}.get(tag, [])

    def handle_endtag(self, tag):
        if tag not in (name for name, _ in self.open):
            return
        while self.open.pop()[0] != tag:
            pass
        if tag in BLOCKS and not self.hidden():
            self.parts.append(self.gap(tag))

    def handle_data(self, data):
        if not self.hidden():
            as_it_is = any(name == "pre" for name, _ in self.open)
            self.parts.append(data if as_it_is else re.sub(r"\s+", " ", data))

    @staticmethod
    def gap(tag: str) -> str:
        return "\n" if tag in NARROW else "\n\n"


def page_text(html: str) -> str:
    reader = Reader()
    reader.feed(html)
    reader.close()
    text = "".join(reader.parts).replace("\xa0", " ").replace("¶", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n (?=\S)", "\n", text)
    text = re.sub(r"(?m)^-\n+(?=\S)", "- ", text)  # a paragraph in an item
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def chapters(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        stop = text.find("\n\n", start + CHAPTER)
        stop = len(text) if stop < 0 else stop
        yield text[start:stop].strip() + "\n"
        start = stop


def documents(packages: Path) -> Iterator[tuple[str, str]]:
    """-> (source/name, text), in the order of names"""
    for source, (folder, left_out) in PACKAGES.items():
        root = packages / source / folder
        for path in sorted(root.rglob("*")):
            name = f"{source}/{path.relative_to(root)}"
            if path.is_symlink() or re.search(left_out, name) or not path.is_file():
                continue
            if path.name.endswith(".txt.gz"):
                for number, text in enumerate(
                    chapters(gzip.decompress(path.read_bytes()).decode())
                ):
                    yield f"{name}/{number}", text
            elif path.suffix == ".html" and not re.search(r"\.[a-z]{2}(-[a-z]{2})?\.html$", name):
                yield name, page_text(path.read_text("utf-8", "replace"))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def split(found: Iterator[tuple[str, str]]) -> tuple[list, list]:
    """-> training and held-out documents, each in an order and by a choice that hashes give."""
    unique = {
        digest("".join(text.split())): (n, text) for n, text in found if len(text) >= SHORTEST
    }
    train, held, taken = [], [], Counter()
    for name, text in sorted(unique.values(), key=lambda d: digest(d[0])):
        source = name.split("/")[0]
        fits = taken[source] + len(text) <= HELD_OUT_A_SOURCE
        if len(text) in HELD_OUT_SIZES and fits:
            taken[source] += len(text)
            held.append((name, text))
        else:
            train.append((name, text))
    return train, held


def chat(text: str) -> list[dict[str, str]]:
    """A document as a question and its answer: its second half continues the first."""
    middle = text.find("\n\n", len(text) // 2)
    middle = len(text) // 2 if middle < 0 else middle
    return [
        {"role": "user", "content": "Continue this text.\n\n" + text[:middle].strip()},
        {"role": "assistant", "content": text[middle:].strip()},
    ]


def write(path: Path, found: list[tuple[str, str]], chats: int) -> None:
    """chats: every so many documents are written as a chat; 0: none"""
    with path.open("w") as out:
        for number, (name, text) in enumerate(found):
            as_chat = chats and number % chats == 0
            record = {"messages": chat(text)} if as_chat else {"text": text}
            out.write(json.dumps({**record, "source": name}, ensure_ascii=False) + "\n")
    sizes = Counter()
    for name, text in found:
        sizes[name.split("/")[0]] += len(text)
    print(f"{path}: {len(found)} documents, {path.stat().st_size / 1e6:.1f} MB, "
          f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")  # fmt: skip
    print("  " + ", ".join(f"{n} {size / 1e6:.2f}" for n, size in sizes.items()))


def fetch(packages: Path) -> None:
    """Downloads and unpacks what is not there yet."""
    packages.mkdir(parents=True, exist_ok=True)
    for name in (n for n in PACKAGES if not (packages / n).is_dir()):
        if not list(packages.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=packages, check=True)
        (deb,) = packages.glob(f"{name}_*.deb")
        print(f"{deb.name} sha256 {hashlib.sha256(deb.read_bytes()).hexdigest()}")
        subprocess.run(["dpkg-deb", "-x", str(deb), str(packages / name)], check=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", metavar="WORK", type=Path)
    args = parser.parse_args(argv)
    fetch(args.work / "packages")
    train, held = split(documents(args.work / "packages"))
    write(args.work / "train.jsonl", train, chats=4)
    write(args.work / "heldout.jsonl", held, chats=0)


if __name__ == "__main__":
    main()
