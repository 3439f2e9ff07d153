"""The needle task: long readable filler with facts, "The code of Maria is 7319.", and questions.

Training examples and held-out prompts come from disjoint seed spaces.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from . import lexicon as lex
from .tokenizer import encode
from .writer import CODE_TOKENS, RECALL, Writer, question

__all__ = [
    "CODE_TOKENS",
    "RECALL",
    "Prompt",
    "held_out_documents",
    "make_prompts",
    "training_example",
    "training_text",
]


def training_example(rng: Random, length: int, drill_share: float) -> tuple[list[int], list[int]]:
    """(token ids, labels), both [length], for the dense model; a drill with probability
    `drill_share`."""
    w = Writer(rng)
    if rng.random() < drill_share:
        _drill(w, length)
    else:
        _conversation(w, length, rng.uniform(0.15, 0.9))
    return encode(w.pieces[:length]), w.labels[:length]


def training_text(rng: Random, length: int) -> str:
    """A text of `length` tokens for the retrofit: mostly one long passage, as in use."""
    w = Writer(rng)
    _conversation(w, length, rng.uniform(0.6, 0.95))
    return "".join(w.pieces[:length])


def _drill(w: Writer, length: int) -> None:
    """Facts without filler, then the same facts again in random order, over and over.

    Many recalls a token: without them matching by name is learned late.
    """
    w.open_user()
    names = w.rng.sample(lex.NAMES, w.rng.randint(3, max(3, min(24, length // 20))))
    while len(w.pieces) < length:
        for name in w.rng.sample(names, len(names)):
            w.state(name)


def _conversation(w: Writer, length: int, share: float) -> None:
    """A passage with facts of `share` of the length, questions, and now and then some more text
    and facts."""
    rng = w.rng
    unused = rng.sample(lex.NAMES, len(lex.NAMES))
    passage = int(length * share)
    rate = min(0.4, 12 * rng.randint(3, max(4, min(32, passage // 20))) / passage)
    while len(w.pieces) < length:
        w.open_user()
        stop = (
            passage
            if len(w.pieces) < 4
            else len(w.pieces) + rng.choice((0, 0, 0, 0, 0, 20, 60, 120))
        )
        while len(w.pieces) < stop or not w.facts:
            if rng.random() < rate or (not w.facts and len(w.pieces) + 20 > stop):
                w.state(unused.pop() if len(unused) > 64 else rng.choice(list(w.facts)))
            elif w.facts and rng.random() < 0.3 * rate:
                w.state(rng.choice(list(w.facts)))
            else:
                w.sentence()
        if w.pieces[-1] != "\n":
            w.add(["\n"])
        kind = rng.choice(("ask", "ask", "ask", "report"))
        count = min(
            len(w.facts), rng.choice((1, 1, 1, 2, 3)) if kind == "ask" else rng.randint(2, 4)
        )
        names = rng.sample(list(w.facts), count)
        w.ask(kind, names)
        w.answer(kind, names)


@dataclass(frozen=True)
class Prompt:
    """A held-out document of `needles` facts with one question at its end."""

    text: str  # rendered with the chat template, ready for a completion request
    user: str  # the user message alone, for a chat request
    names: tuple[str, ...]
    answers: tuple[str, ...]
    depths: tuple[float, ...]  # where each asked fact stands: 0 start of the document, 1 end


def _document(rng: Random, length: int, needles: int) -> tuple[Writer, dict[str, float]]:
    """A user turn of `length` tokens with facts at stratified random depths; name -> depth."""
    w = Writer(rng)
    w.open_user()
    names = rng.sample(lex.NAMES, needles)
    depths = [(i + rng.random()) / needles for i in range(needles)]
    for name, depth in zip(names, depths, strict=True):
        # 11 tokens a fact: the last ones must still fit.
        while len(w.pieces) < min(depth * length, length - 16):
            w.sentence()
        w.state(name)
    while len(w.pieces) < length - 20:
        w.sentence()
    w.add(["\n"])
    return w, dict(zip(names, depths, strict=True))


def make_prompts(
    seed: int, length: int, n: int, *, needles: int = 16, asked: int = 1, kind: str = "ask"
) -> list[Prompt]:
    """n held-out prompts of about `length` tokens; `kind` "report" recalls in the middle of
    generation."""
    prompts = []
    for i in range(n):
        rng = Random(f"held-out:{seed}:{length}:{i}")
        # Question, chat frame and answer: 40 tokens cover three names.
        w, depths = _document(rng, length - 40, needles)
        names = rng.sample(list(depths), asked)
        w.add(question(kind, names))
        head = ["<|im_start|>", "user", "\n"]
        user = "".join(w.pieces[len(head) :])
        text = "".join(head) + user + "<|im_end|>\n<|im_start|>assistant\n"
        prompts.append(
            Prompt(
                text,
                user,
                tuple(names),
                tuple(w.facts[x] for x in names),
                tuple(depths[x] for x in names),
            )
        )
    return prompts


def held_out_documents(
    seed: int, length: int, n: int
) -> Iterator[tuple[list[int], list[tuple[int, float]]]]:
    """Teacher-forced held-out documents: (token ids [<= length], [(index of an answer's first
    digit, depth)]).

    Each of up to 16 facts is asked once after the document, in random order, one turn per fact.
    """
    needles = max(2, min(16, length // 64))
    for i in range(n):
        rng = Random(f"held-out:{seed}:{length}:{i}")
        turn = 29  # tokens of a question, its answer and their frame
        w, depths = _document(rng, length - needles * turn, needles)
        spots = []
        for j, name in enumerate(rng.sample(list(depths), needles)):
            if j:
                w.open_user()
            w.ask("ask", [name])
            spots.append((len(w.pieces) + 5, depths[name]))
            w.answer("ask", [name])
        if len(w.pieces) > length:
            raise ValueError(
                f"document of {len(w.pieces)} tokens, limit {length}: too short for {needles} facts"
            )
        yield encode(w.pieces), spots
