"""The tokenizer of the needle corpus: one token a word, two digits a token, bytes for the rest.

A *piece* is a string that is exactly one token, so lengths are known without running anything.
"""

import re
from functools import cache

from . import lexicon as lex

_SPLIT = re.compile(r"<\|\w+\|>| ?\d{1,2}| ?[^\W\d_]+|[^\w\s]|\s")


def to_pieces(text: str) -> list[str]:
    """Text of this corpus -> pieces; a word owns the space before it, digits stand alone."""
    return _SPLIT.findall(text)


@cache
def vocabulary() -> dict[str, int]:
    """piece -> token id: specials, the 256 byte symbols, then words with a leading space and
    bare."""
    from tokenizers import pre_tokenizers

    words = {w for topic in lex.TOPICS.values() for group in topic for w in group}
    for group in (
        lex.ADJECTIVES,
        lex.MOVES,
        lex.ADVERBS,
        lex.PREPOSITIONS,
        lex.TIMES,
        lex.WEATHER,
        lex.NUMBERS,
        lex.REASONS,
        lex.NAMES,
        lex.CITIES,
        lex.FRAME,
    ):
        words.update(group)
    words.update(w for p in lex.PATTERNS for w in re.findall(r"(?<!<)\b[A-Za-z]+\b(?!>)", p))
    byte_symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = sorted(
        w for w in words if len(w) > 1 and (w[0].isupper() or w in ("user", "assistant", "system"))
    )
    spaced = ["Ġ" + w for w in sorted(words)]
    pairs = [f"{n:02d}" for n in range(100)]
    numbers = pairs + ["Ġ" + p for p in pairs]
    return {
        token: i for i, token in enumerate([*lex.SPECIALS, *byte_symbols, *numbers, *bare, *spaced])
    }


def build_tokenizer():
    """A `PreTrainedTokenizerFast` that maps each piece to one token and any other text to bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # ignore_merges: a pre-token found whole in the vocabulary is one token; with no merges all
    # else is bytes.
    core = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def encode(pieces: list[str]) -> list[int]:
    vocab = vocabulary()
    return [vocab[p.replace(" ", "Ġ").replace("\n", "Ċ")] for p in pieces]
