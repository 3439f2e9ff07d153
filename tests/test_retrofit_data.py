"""Where training text comes from, and that its form decides nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from vllm_dms.retrofit import data


class Bytes:
    """A tokenizer of bytes, as far as the retrofit uses one."""

    eos_token_id = 0
    chat_template = "chat"

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        return SimpleNamespace(input_ids=[list(text.encode()) for text in texts])

    def apply_chat_template(self, messages, tokenize):
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


RECORDS = [{"text": "first\nline"}, {"messages": [{"role": "user", "content": "hi"}]}]
TEXTS = ["first\nline", "<user>hi"]


def test_records_of_any_file_are_the_same_texts(tmp_path):
    lines, whole = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text("\n".join(map(json.dumps, RECORDS)) + "\n\n")
    whole.write_text(json.dumps(RECORDS))
    for path in (lines, whole):
        assert list(data.read_texts(path, Bytes())) == TEXTS
    plain = tmp_path / "a.md"
    plain.write_text(TEXTS[0])
    assert list(data.read_texts(plain)) == TEXTS[:1]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS[:1]), path)
    assert list(data.read_texts(path)) == TEXTS[:1]


@pytest.mark.parametrize("record", [{"content": "x"}, ["x"], {"text": 3}])
def test_a_record_without_text_is_named(tmp_path, record):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps(record))
    with pytest.raises(ValueError, match=r"a\.jsonl, record 2"):
        list(data.read_texts(path, Bytes()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text": "tw',
            r"a\.jsonl can't be read after record 1: Unter",
        ),
        ("a.json", b"[", r"a\.json can't be read after record 0"),
        ("a.txt", b"\xff\xfe", r"a\.txt can't be read after record 0: 'utf-8' codec"),
        ("a.parquet", b"PAR1nothing", r"a\.parquet can't be read after record 0"),
    ],
    ids=lambda value: value if isinstance(value, str) and value[:2] == "a." else "",
)
def test_a_broken_source_is_named(tmp_path, name, content, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow.parquet")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(data.read_texts(tmp_path / name, Bytes()))


def test_messages_need_a_template():
    with pytest.raises(ValueError, match="no chat template"):
        data.document(RECORDS[1], "here", SimpleNamespace(chat_template=None))


def test_a_missing_file_and_a_missing_library_are_refused_at_once(monkeypatch):
    with pytest.raises(ValueError, match="there is no such file"):
        data.check_source("missing.txt")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        data.check_source("some/dataset")


def test_a_dataset_is_streamed_as_far_as_it_is_needed(monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        assert (name, split, streaming) == ("some/dataset", "part", True)
        for n in range(10**9):
            asked.append(n)
            yield {"text": "0123456789"}

    fake = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(__import__("sys").modules, "datasets", fake)
    rows = data.load_rows("some/dataset", Bytes(), length=8, most=3, split="part")
    assert rows.shape == (3, 8) and len(asked) <= data.BATCH


def test_pieces_change_no_token(monkeypatch):
    text = "".join(f"line {n}\n\n  indented {n}\n" for n in range(200))
    monkeypatch.setattr(data, "PIECE", 100)
    found = list(data.pieces(text))
    assert len(found) > 20 and "".join(found) == text
    assert all(x.endswith("\n") and not x[0].isspace() for x in found)
    ids = list(data.tokenize([text, "b"], Bytes()))
    assert [x.tolist() for x in ids] == [list(text.encode()), [98]]
    assert ids[0].dtype == np.int32


def test_less_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"a\.txt with b\.txt holds less than one row of 8 tokens"):
        data.pack([[1, 2]], 8, eos=0, source="a.txt with b.txt")


def test_sources_are_mixed_in_equal_parts(tmp_path):
    """By tokens, not by documents; what one lacks the others give."""
    long, short = (iter([np.full(size, size)] * count) for size, count in ((30, 4), (10, 20)))
    sizes = [len(ids) for ids in data.mixed([long, short])]
    assert sizes[:8] == [30, 10, 10, 10] * 2 and sorted(sizes) == [10] * 20 + [30] * 4
    for name, text in (("a.txt", "a" * 40), ("b.txt", "b" * 40)):
        (tmp_path / name).write_text(text)
    rows = data.load_rows([str(tmp_path / n) for n in ("a.txt", "b.txt")], Bytes(), 81, 1)
    assert bytes(rows[0].tolist()) == b"a" * 40 + b"\0" + b"b" * 40
