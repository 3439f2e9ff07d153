"""Training text: documents become rows of exactly `length` token ids, shuffled by seed.

A source is a file (.jsonl, .json, .parquet, or plain text) or the name of a Hugging Face dataset,
which is streamed. A record has a "text", or "messages" that go through the tokenizer's chat
template.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

TEXT, MESSAGES = "text", "messages"
BATCH = 64  # documents that are tokenized at a time
PIECE = 100_000  # characters; a longer document is tokenized in pieces
REPORT_SECONDS = 5.0


def check_source(source: str, flag: str = "--data") -> None:
    """Refuses what can't be read, before anything slow happens."""
    path = Path(source)
    if path.is_file():
        if path.suffix == ".parquet":
            _library("pyarrow", f"{flag} {source}")
        return
    if path.suffix or path.exists() or source.count("/") > 1:
        raise ValueError(f"{flag} {source}: there is no such file.")
    _library("datasets", f"{flag} {source} is no file, so it is taken for a Hugging Face dataset,")


def _library(name: str, what: str):
    try:
        return __import__(name)
    except ImportError:
        raise ValueError(f"{what} needs the package {name}: pip install {name}.") from None


def read_texts(source: str | Path, tokenizer=None, split: str = "train") -> Iterator[str]:
    """The documents of a source; plain text is one. tokenizer: for records with messages."""
    for number, record in enumerate(_records(str(source), split), 1):
        yield document(record, f"{source}, record {number}", tokenizer)


def _records(name: str, split: str) -> Iterator[object]:
    """Errors say in which source they are, and how far it was read."""
    number = 0
    try:
        for record in _read(Path(name), name, split):
            yield record
            number += 1
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} can't be read after record {number}: {error}") from None


def _read(path: Path, name: str, split: str) -> Iterator[object]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    elif path.suffix == ".json":
        found = json.loads(path.read_text("utf-8"))
        yield from found if isinstance(found, list) else [found]
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        for group in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from group.to_pylist()
    elif path.is_file():
        yield {TEXT: path.read_text("utf-8")}
    else:
        import datasets

        yield from datasets.load_dataset(name, split=split, streaming=True)


def document(record: object, where: str, tokenizer) -> str:
    if isinstance(record, dict) and isinstance(record.get(TEXT), str):
        return record[TEXT]
    if isinstance(record, dict) and isinstance(record.get(MESSAGES), list):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f'{where} has "{MESSAGES}", but the tokenizer has no chat template: give '
                f'documents with "{TEXT}".'
            )
        return tokenizer.apply_chat_template(record[MESSAGES], tokenize=False)
    raise ValueError(
        f'{where}: expected a JSON object with a string "{TEXT}" or a list "{MESSAGES}".'
    )


def pieces(text: str) -> Iterator[str]:
    """Cut before lines, where tokenizers cut as well."""
    start = 0
    while len(text) - start > PIECE:
        cut = re.compile(r"\n(?=\S)").search(text, start + PIECE)
        if cut is None:
            break
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def tokenize(texts: Iterable[str], tokenizer) -> Iterator[np.ndarray]:
    """int32 ids of each document; says how far it is when it takes long."""
    count, said = 0, time.monotonic()
    texts = iter(texts)
    while group := list(islice(texts, BATCH)):
        parts = [list(pieces(text)) for text in group]
        flat = [piece for part in parts for piece in part]
        ids = iter(tokenizer(flat, add_special_tokens=False, verbose=False).input_ids)
        for part in parts:
            found = [np.asarray(x, dtype=np.int32) for x in islice(ids, len(part))]
            count += sum(map(len, found))
            yield np.concatenate(found)
        if time.monotonic() - said > REPORT_SECONDS:
            said = time.monotonic()
            print(f"read {count:,} tokens", flush=True)


def pack(
    documents: Iterable[Sequence[int] | np.ndarray],
    length: int,
    eos: int,
    most: int | None = None,
    source: str = "the data",
) -> torch.Tensor:
    """Token ids -> int32 (rows, length), at most `most` rows: documents cut and joined by eos; an
    unfinished last row is dropped. source: what errors call it.

    A document of exactly `length` tokens that starts a row fills it alone.
    """
    rows, rest, count = [], np.empty(0, np.int32), 0
    for ids in documents:
        joint = [eos] if len(rest) else []
        flat = np.concatenate((rest, np.asarray(joint, np.int32), np.asarray(ids, np.int32)))
        whole = len(flat) // length
        rows.append(flat[: whole * length].reshape(whole, length))
        rest, count = flat[whole * length :].copy(), count + whole
        if most is not None and count >= most:
            break
    if not count:
        raise ValueError(
            f"{source} holds less than one row of {length} tokens: give more text or a lower "
            "--length."
        )
    return torch.from_numpy(np.concatenate(rows)[:most])


def mixed(sources: list[Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Always from the source of which the fewest tokens have come, to the end of all."""
    taken = dict.fromkeys(range(len(sources)), 0)
    while taken:
        least = min(taken, key=lambda n: taken[n])
        ids = next(sources[least], None)
        if ids is None:
            del taken[least]
            continue
        taken[least] += len(ids)
        yield ids


def load_rows(
    source: str | Path | Sequence[str], tokenizer, length: int, most: int, split: str = "train"
) -> torch.Tensor:
    """int32 (rows, length) of a source, or of several in equal parts. most: rows that are read if
    one is a stream; files are read to their end."""
    names = [source] if isinstance(source, str | Path) else list(source)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    documents = [tokenize(read_texts(name, tokenizer, split), tokenizer) for name in names]
    files = all(Path(name).is_file() for name in names)
    return pack(
        mixed(documents), length, eos, None if files else most, " with ".join(map(str, names))
    )


def batch(rows: torch.Tensor, step: int, size: int, seed: int) -> torch.Tensor:
    """int64 (size, length): the rows of one step, a pure function of (step, seed); reshuffled
    every epoch."""
    picks = []
    for n in range(step * size, (step + 1) * size):
        epoch, place = divmod(n, len(rows))
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(seed * 100003 + epoch)
        )
        picks.append(order[place])
    return rows[torch.stack(picks)].long()
