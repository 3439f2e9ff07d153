"""How the embedded checkpoint is made: a piece of its corpus is a token, lengths are exact, answers
stand in the text, and random eviction evicts at its rates."""

from random import Random

import pytest
import torch
from transformers import AutoTokenizer

from examples.tiny import needles
from examples.tiny.tokenizer import build_tokenizer
from vllm_dms.retrofit.controls import RandomEviction


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As a server loads it."""
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def test_texts_and_tokens_agree(tokenizer):
    for seed in range(5):
        for drills in (0.0, 1.0):
            ids, labels = needles.training_example(Random(seed), 300, drills)
            assert len(ids) == len(labels) == 300
            assert tokenizer(tokenizer.decode(ids)).input_ids == ids
        assert len(tokenizer(needles.training_text(Random(seed), 300)).input_ids) == 300


def test_any_text_survives(tokenizer):
    text = "Wörter, code_x = 12345; <tag> \t the end\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(("kind", "asked"), [("ask", 1), ("ask", 3), ("report", 3)])
def test_prompts(tokenizer, kind, asked):
    prompts = needles.make_prompts(7, 1024, 4, needles=8, asked=asked, kind=kind)
    assert prompts == needles.make_prompts(7, 1024, 4, needles=8, asked=asked, kind=kind)
    for prompt in prompts:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.user}], tokenize=False, add_generation_prompt=True
        )
        assert rendered == prompt.text
        assert 1024 - 80 < len(tokenizer(prompt.text).input_ids) <= 1024
        assert len(prompt.names) == len(prompt.answers) == asked
        for name, answer in zip(prompt.names, prompt.answers, strict=True):
            assert prompt.text.count(f"The code of {name} is {answer}.") == 1


@pytest.mark.parametrize("length", [128, 256, 1024, 4096])
def test_held_out_documents(tokenizer, length):
    for ids, spots in needles.held_out_documents(3, length, 2):
        assert length - 100 < len(ids) <= length and len(spots) == max(2, min(16, length // 64))
        for first, depth in spots:
            answer = tokenizer.decode(ids[first : first + needles.CODE_TOKENS])
            fact = tokenizer.decode(ids[first - 5 : first + needles.CODE_TOKENS]).strip()
            assert fact.startswith("The code of ") and fact.endswith(answer)
            # Stated once in the document, once more in the answer.
            assert tokenizer.decode(ids).count(fact) == 2 and 0 <= depth <= 1


def test_random_eviction_matches_its_rates():
    rates = torch.tensor([[0.2, 0.9]])
    _, evict = RandomEviction(rates, seed=0)(torch.zeros(4, 2, 5000), layer=0)
    torch.testing.assert_close(evict.mean((0, 2)), rates[0], rtol=0, atol=0.02)
