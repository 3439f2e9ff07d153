"""The quality evaluation measures what it says: distances, spans of the codes, blind controls."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import random_tokens

from benchmarks.quality.controls import Blind
from benchmarks.quality.engine import distance
from benchmarks.quality.task import Task
from examples.tiny.tokenizer import build_tokenizer
from vllm_dms.reference import live_counts

TOKENS, VOCAB = 40, 50


def tables(logits, count):
    """What vLLM lists: the best `count` tokens of each row, by id."""
    values, ids = logits.log_softmax(-1).topk(count)
    order = ids.argsort(1)
    return ids.gather(1, order).numpy(), values.gather(1, order).numpy()


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    p = 2 * torch.randn(TOKENS, VOCAB, generator=generator)
    return p, p + 0.5 * torch.randn(TOKENS, VOCAB, generator=generator)


def exact(p, q, start):
    p, q = p.log_softmax(-1)[start:], q.log_softmax(-1)[start:]
    return (p.exp() * (p - q)).sum(-1)


def test_over_the_whole_vocabulary_the_distance_is_exact(pair):
    found = distance([tables(pair[0], VOCAB)], [tables(pair[1], VOCAB)], [7])
    kl = exact(*pair, 7)
    assert found["scored_positions"] == TOKENS - 7
    assert found["kl_mean"] == pytest.approx(kl.mean().item(), abs=1e-5)
    assert found["kl_max"] == pytest.approx(kl.max().item(), abs=1e-3)
    same = (pair[0].argmax(-1) == pair[1].argmax(-1))[7:].float().mean().item()
    assert found["top1_agreement"] == pytest.approx(same, abs=1e-5)


def test_over_the_best_tokens_the_distance_is_a_lower_bound(pair):
    found = distance([tables(pair[0], 12)], [tables(pair[1], 12)], [0])
    kl = exact(*pair, 0).mean().item()
    assert 0.3 * kl < found["kl_mean"] < kl


def test_nothing_to_score_is_no_distance():
    empty = (np.zeros((3, 2), int), np.zeros((3, 2)))
    assert distance([empty], [empty], [3])["scored_positions"] == 0


def test_spans_are_the_codes(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    # AutoTokenizer asks the directory's config which family it is.
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    task = Task.build(tmp_path, [512], prompts=3, asked=3, scored=1, seed=0)
    for question in task.questions[512]:
        assert 400 < len(question.prompt) + len(question.answer) <= 512
        for code, (first, end) in zip(question.codes, question.spans, strict=True):
            assert tokenizer.decode(question.answer[first:end]).strip() == code
            assert code in tokenizer.decode(question.prompt)


def test_blind_eviction_follows_its_rates(checkpoint):
    model = Blind.from_dir(checkpoint("nvidia-adapter"))
    model.dms = replace(model.dms, window=8)
    model.rates = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    model.generator = torch.Generator().manual_seed(0)
    evict = model.forward(random_tokens(900, seed=5)).evict
    torch.testing.assert_close(evict[..., :-1].float().mean(-1), model.rates, rtol=0, atol=0.06)
    assert live_counts(evict, 8)[0].tolist() == [900, 9]
