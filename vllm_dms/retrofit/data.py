"""Training text: a file becomes rows of exactly `length` token ids, shuffled by seed."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch


def read_texts(path: Path) -> Iterator[str]:
    """.jsonl: the "text" of each line; any other suffix: the whole file as one text."""
    if not path.is_file():
        raise ValueError(f"--data {path}: there is no such file.")
    if path.suffix != ".jsonl":
        yield path.read_text()
        return
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(
                    f'{path}, line {number}: expected a JSON object with a string "text".'
                )
            yield record["text"]


def pack(documents: Iterable[list[int]], length: int, eos: int) -> torch.Tensor:
    """Token lists -> int32 (rows, length): documents cut and joined by eos; an unfinished last row
    is dropped.

    A document of exactly `length` tokens that starts a row fills it alone.
    """
    rows, row = [], []
    for ids in documents:
        if row:
            row.append(eos)
        row.extend(ids)
        while len(row) >= length:
            rows.append(row[:length])
            row = row[length:]
    if not rows:
        raise ValueError(
            f"the data holds less than one row of {length} tokens: give more text or a lower "
            "--length."
        )
    return torch.tensor(rows, dtype=torch.int32)


def load_rows(path: Path, tokenizer, length: int) -> torch.Tensor:
    """int32 (rows, length)"""
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    texts = read_texts(path)
    documents = (
        tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts
    )
    return pack(documents, length, eos)


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
