"""Tasks by the recipe of RULER (Hsieh et al., 2024, arXiv:2404.06654), generated here: nothing is
downloaded. Without its question answering, which takes SQuAD and HotpotQA.

Wordings are close to the paper's, not its files: scores compare arms of one run, and only roughly
with published ones. A score is the share of the expected strings that the answer has in it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from examples.tiny.lexicon import NAMES

ANSWER_TOKENS = {"niah_single": 64, "niah_multikey": 64, "niah_multivalue": 128, "vt": 64,
                 "cwe": 128, "fwe": 64}  # fmt: skip
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
MULTIPLE = 4  # keys, values
HOPS = 4
COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
FREQUENT, ZIPF = 3, 2.0
SYLLABLES = "ba ce di fo gu ha je ki lo mu na pe ri so tu va we xi yo zu".split()  # noqa: SIM905


@dataclass(frozen=True)
class Sample:
    task: str
    question: str  # what the user says
    begun: str  # how the answer begins
    expected: tuple[str, ...]

    def score(self, answer: str) -> float:
        """Of whole words and numbers."""
        found = set(re.findall(r"\w+", answer.lower()))
        return sum(word.lower() in found for word in self.expected) / len(self.expected)


# (rng, units of filler, sentences of an essay) -> a sample as long as that
Maker = Callable[[Random, int, list[str]], Sample]


def _insert(rng: Random, filler: list[str], needles: list[str]) -> str:
    """Needles at random places, in their order."""
    places = sorted(rng.sample(range(len(filler) + 1), min(len(needles), len(filler) + 1)))
    places += [len(filler)] * (len(needles) - len(places))
    parts = list(filler)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        parts.insert(place, needle)
    return "\n".join(parts)


def _essay(rng: Random, units: int, sentences: list[str]) -> list[str]:
    start = rng.randrange(len(sentences))
    return [sentences[(start + n) % len(sentences)] for n in range(units)]


def _niah(task: str, keys: int, values: int) -> Maker:
    def make(rng: Random, units: int, sentences: list[str]) -> Sample:
        names = rng.sample(NAMES, keys)
        numbers = [str(n) for n in rng.sample(range(1_000_000, 10_000_000), keys * values)]
        facts = [(names[n // values], number) for n, number in enumerate(numbers)]
        needles = [f"One of the special magic numbers for {k} is: {v}." for k, v in facts]
        rng.shuffle(needles)
        text = _insert(rng, _essay(rng, units, sentences), needles)
        asked = rng.choice(names)
        what = f"special magic number{'s' if values > 1 else ''} for {asked} mentioned in the text"
        are = "are" if values > 1 else "is"
        return Sample(
            task,
            "Some special magic numbers are hidden within the following text. Memorize them. I "
            f"will quiz you about them afterwards.\n\n{text}\n\nWhat {are} the {what}?",
            f"The {what} {are}",
            tuple(number for name, number in facts if name == asked),
        )

    return make


def _variables(rng: Random, units: int, sentences: list[str]) -> Sample:
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(HOPS + 1)]
    value = str(rng.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]
    text = _insert(rng, [NOISE] * units, chain)
    return Sample(
        "vt",
        "Memorize and track the chain of variable assignments hidden in the following text.\n\n"
        f"{text}\n\nFind all variables that are assigned the value {value} in the text above.",
        f"According to the chain of variable assignments, {len(names)} variables are assigned the "
        f"value {value}:",
        tuple(names),
    )


def _word(rng: Random) -> str:
    return "".join(rng.sample(SYLLABLES, 3))


def _words(rng: Random, count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_word(rng)] = None
    return list(found)


def _common_words(rng: Random, units: int, sentences: list[str]) -> Sample:
    words = _words(rng, COMMON + units)
    common, rare = words[:COMMON], words[COMMON:]
    listed = common * COMMON_TIMES + rare * RARE_TIMES
    rng.shuffle(listed)
    text = " ".join(f"{n}. {word}" for n, word in enumerate(listed, 1))
    return Sample(
        "cwe",
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{text}\nQuestion: What are the {COMMON} most "
        "common words in the above list?",
        f"The top {COMMON} words that appear most often in the list are:",
        tuple(common),
    )


def _frequent_words(rng: Random, units: int, sentences: list[str]) -> Sample:
    """By Zipf's law, each with at least one fewer than the one before."""
    words = _words(rng, 2 + units // 20 + FREQUENT)
    times = [max(round(20 * units / (n + 1) ** ZIPF / 1.6), 1) for n in range(len(words))]
    for n in range(FREQUENT, 0, -1):
        times[n - 1] = max(times[n - 1], times[n] + 1)
    listed = [word for word, count in zip(words, times, strict=True) for _ in range(count)]
    rng.shuffle(listed)
    return Sample(
        "fwe",
        "Read the following coded text and track the frequency of each coded word. Find the "
        f"{FREQUENT} most frequently appeared coded words.\n{' '.join(listed)}\nQuestion: What are "
        f"the {FREQUENT} most frequently appeared words in the above coded text?",
        f"According to the coded text above, the {FREQUENT} most frequently appeared words are:",
        tuple(words[:FREQUENT]),
    )


TASKS: dict[str, Maker] = {
    "niah_single": _niah("niah_single", 1, 1),
    "niah_multikey": _niah("niah_multikey", MULTIPLE, 1),
    "niah_multivalue": _niah("niah_multivalue", 1, MULTIPLE),
    "vt": _variables,
    "cwe": _common_words,
    "fwe": _frequent_words,
}


def sentences_of(text: str) -> list[str]:
    """Of prose, for an essay to hide needles in."""
    flat = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    return [s for s in flat if 30 <= len(s) <= 300]


def make(
    task: str, seed: int, room: int, count: Callable[[Sample], int], sentences: list[str]
) -> Sample | None:
    """The longest sample of a task whose prompt has at most `room` tokens, by `count`; None: even
    the shortest has more."""

    def sample(units: int) -> Sample:
        return TASKS[task](Random(f"{task} {seed}"), units, sentences)

    if count(sample(0)) > room:
        return None
    low, high = 0, 1  # low fits, high does not
    while count(sample(high)) <= room:
        low, high = high, 2 * high
    while high - low > max(low // 64, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if count(sample(middle)) <= room else (low, middle)
    return sample(low)
