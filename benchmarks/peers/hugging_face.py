"""Generation by transformers' own loop, as its users write it."""

from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from load import Load, timed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def generate(load: Load, model: Any, around: AbstractContextManager) -> dict[str, Any]:
    """``around``: entered for each generation. Sampled: with random weights, greedy decoding
    repeats a token."""
    ids = torch.tensor(load.prompts(model.config.vocab_size), device=DEVICE)
    held: list[int] = []

    def once(tokens: int) -> None:
        with around, torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
                return_dict_in_generate=True,
            )
        held.append(out.past_key_values.get_seq_length())

    seconds = timed(once, load.tokens)
    return {"seconds": seconds, "held": held[-1], "transformers": transformers.__version__}
