"""Sentences, facts and questions, written piece by piece with a label each.

A text is a list of pieces, each one token (see tokenizer), so lengths in tokens are exact.
"""

import re
from functools import cache
from random import Random

from . import lexicon as lex

FILLER, NEW_VALUE, RECALL = 0, 1, 2  # label of a piece: what predicting it takes
CODE_TOKENS = 2  # a code is four digits, two a token


@cache
def _patterns() -> list[list[str]]:
    """Each sentence pattern as pieces and slots; a slot keeps its leading space: " <adj>"."""
    return [re.findall(r" ?<\w+>| ?\w+|[^\w\s]", " " + p) for p in lex.PATTERNS]


def _code(rng: Random) -> str:
    return f"{rng.randrange(10000):04d}"


def _code_pieces(code: str) -> list[str]:
    return [" " + code[:2], code[2:]]


_SLOTS = {
    "adj": lex.ADJECTIVES,
    "move": lex.MOVES,
    "adverb": lex.ADVERBS,
    "prep": lex.PREPOSITIONS,
    "time": lex.TIMES,
    "weather": lex.WEATHER,
    "number": lex.NUMBERS,
    "reason": lex.REASONS,
    "name": lex.NAMES,
    "city": lex.CITIES,
}


def filler_sentence(rng: Random, topic: str) -> list[str]:
    """One grammatical sentence, every piece with its leading space."""
    people, things, places, verbs = lex.TOPICS[topic]
    out = []
    for part in rng.choice(_patterns()):
        if part[-1] != ">":
            out.append(part)
            continue
        slot = part.strip(" <>")
        if slot == "code":
            out += _code_pieces(_code(rng))
            continue
        words = (
            _SLOTS.get(slot)
            or {"person": people, "thing": things, "place": places, "verb": verbs}[slot]
        )
        out.append(" " + rng.choice(words))
    return out


def fact(name: str, code: str) -> list[str]:
    """The code of Maria is 7319."""
    return [" The", " code", " of", " " + name, " is", *_code_pieces(code), "."]


def _list_names(names: list[str]) -> list[str]:
    """Maria, Omar and Lin"""
    out = []
    for i, name in enumerate(names):
        if i:
            out.append(" and" if i == len(names) - 1 else ",")
        out.append(" " + name)
    return out


def question(kind: str, names: list[str]) -> list[str]:
    if kind == "report":
        return [
            "Write",
            " a",
            " report",
            " with",
            " the",
            " codes",
            " of",
            *_list_names(names),
            ".",
        ]
    if len(names) == 1:
        return ["What", " is", " the", " code", " of", " " + names[0], "?"]
    return ["What", " are", " the", " codes", " of", *_list_names(names), "?"]


class Writer:
    """Collects pieces with a label each."""

    def __init__(self, rng: Random):
        self.rng = rng
        self.pieces: list[str] = []
        self.labels: list[int] = []
        self.facts: dict[str, str] = {}
        self.topic = rng.choice(list(lex.TOPICS))

    def add(self, pieces: list[str], label: int = FILLER) -> None:
        if self.pieces and self.pieces[-1] == "\n" and pieces[0][0] == " ":
            pieces = [pieces[0][1:], *pieces[1:]]
        self.pieces += pieces
        self.labels += [label] * len(pieces)

    def sentence(self) -> None:
        if self.rng.random() < 0.1:
            self.topic = self.rng.choice(list(lex.TOPICS))
        self.add(filler_sentence(self.rng, self.topic))

    def state(self, name: str) -> None:
        """Writes the fact about `name`; its digits are new the first time and a recall after
        that."""
        known = name in self.facts
        code = self.facts.setdefault(name, _code(self.rng))
        pieces = fact(name, code)
        first = pieces.index(" " + code[:2])
        self.add(pieces[:first])
        self.add(pieces[first : first + CODE_TOKENS], RECALL if known else NEW_VALUE)
        self.add(pieces[first + CODE_TOKENS :])

    def open_user(self) -> None:
        self.add(["<|im_start|>", "user", "\n"])

    def ask(self, kind: str, names: list[str]) -> None:
        self.add([*question(kind, names), "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"])

    def answer(self, kind: str, names: list[str]) -> None:
        for i, name in enumerate(names):
            if i and kind == "report":
                for _ in range(self.rng.randint(1, 7)):
                    self.sentence()
            self.state(name)
        self.add(["<|im_end|>", "\n"])
