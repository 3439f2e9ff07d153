"""Quality on real text: tasks are what they say, and what is measured is what it is called."""

import json
import shutil
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from checkpoints import random_tokens
from engines import engine_args
from retrofit_runs import dense, run  # noqa: F401 - dense is a fixture

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import eval_text

from benchmarks.quality import ruler, texts
from benchmarks.quality.blind import blind

SENTENCES = ruler.sentences_of("The quick brown fox jumps over the lazy dog, again and again. " * 3)


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("room", [700, 3000])
def test_a_task_fills_its_room_and_its_text_has_the_answer(task, room):
    def count(sample):
        return len(sample.question.split()) + len(sample.begun.split())

    sample = ruler.make(task, 7, room, count, SENTENCES)
    assert 0.9 * room < count(sample) <= room
    words = sample.question.replace(".", " ").split()
    assert all(word in words for word in sample.expected)
    assert sample.score(" ".join(sample.expected)) == 1 and sample.score("nothing") == 0
    assert sample == ruler.make(task, 7, room, count, SENTENCES)
    assert sample.question != ruler.make(task, 8, room, count, SENTENCES).question
    assert ruler.make(task, 7, 5, count, SENTENCES) is None


def test_the_words_asked_for_are_the_commonest():
    for task, few in (("cwe", ruler.COMMON), ("fwe", ruler.FREQUENT)):
        sample = ruler.TASKS[task](Random(1), 60, SENTENCES)
        listed = [w for w in sample.question.split() if len(w) == 6 and w.isalpha()]
        counts = sorted(((listed.count(w), w) for w in set(listed)), reverse=True)
        assert {w for _, w in counts[:few]} == set(sample.expected)
        assert counts[few - 1][0] > counts[few][0]


def test_a_chain_leads_from_its_value_to_all_variables():
    sample = ruler.TASKS["vt"](Random(1), 60, SENTENCES)
    chain = [line.split() for line in sample.question.splitlines() if line.startswith("VAR")]
    assert [parts[1] for parts in chain] == list(sample.expected)
    assert [parts[-1] for parts in chain[1:]] == list(sample.expected[:-1])


def test_the_mean_of_log_ratios_is_the_divergence():
    rng = np.random.default_rng(0)
    q, p = (rng.dirichlet(np.ones(5)) for _ in range(2))
    drawn = [rng.choice(5, 4000, p=q) for _ in range(8)]
    found = texts.divergence([np.log(q[d]) for d in drawn], [np.log(p[d]) for d in drawn])
    exact = (q * np.log(q / p)).sum()
    assert abs(found["kl"] - exact) < 4 * found["kl_standard_error"] < 0.2 * exact
    assert texts.divergence([np.zeros(1)], [np.zeros(1)])["kl_standard_error"] is None
    assert found["tokens"] == 32_000


def test_an_engine_and_pytorch_measure_the_same(make_engine, dense, tmp_path):  # noqa: F811
    """Perplexity of dms and of eviction off; what an arm writes is scored by itself with itself's
    own log-probabilities, so that nothing lies between."""
    base, adapter = dense("llama", attention_bias=False), tmp_path / "adapter"
    run(base, adapter, form=())
    rows = [[1 + t % 250 for t in random_tokens(97, seed=n)] for n in range(2)]
    plan = texts.Plan(40, {64: [r[-63:] for r in rows]}, {}, [r[:50] for r in rows], 30)

    def answer(others=None, **settings):
        config = {"dms": {"adapter": str(adapter), **settings}}
        settings = engine_args(48, max_model_len=256, max_logprobs=400, additional_config=config)
        return texts.answer(make_engine(base, **settings), plan, 320, others)

    found, off = answer(), answer(evict=False)
    assert found.live["text 64"] > 1.2 and found.live["generation"] > 1.2
    torched = blind(base, adapter, plan, "float32")
    mine = torched[0]["text"][64]
    assert texts.perplexity(found.own[64]) == pytest.approx(mine["perplexity"], rel=1e-3)
    distance = eval_text.distance(off.tables[64], found.tables[64], [0, 0])
    assert distance["kl_mean"] == pytest.approx(mine["kl_mean"], rel=0.02)
    assert distance["scored_positions"] == 80 and mine["kl_mean"] > 1e-3
    live = [row["text"][64]["live_compression"] for row in torched]
    assert live[1] == pytest.approx(live[0], rel=0.15)

    others = [o + ids for o, ids in zip(plan.openings, found.written, strict=True)]
    again = [own[-30:] for own in answer(others).own[0]]
    np.testing.assert_allclose(np.array(found.written_logprobs), np.array(again), atol=1e-3)
    by_off = [own[-30:] for own in answer(others, evict=False).own[0]]
    assert abs(texts.divergence(found.written_logprobs, by_off)["kl"]) > 1e-3


def test_a_report_has_all_arms(dense, tmp_path, monkeypatch):  # noqa: F811
    """Without engines: what is asked of whom, and in which order."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(dense("llama", attention_bias=False), base)
    run(base, adapter, form=())
    asked = []

    def engine(args, arm, plan, others=None):
        asked.append((arm, others))
        found = texts.Answers()
        for length, rows in plan.texts.items():
            found.own[length] = [np.full(plan.scored, -1.0) for _ in rows]
            table = np.arange(3)[None].repeat(plan.scored, 0), np.full((plan.scored, 3), -1.1)
            found.tables[length] = [table for _ in rows]
            found.live[f"text {length}"] = 2.0
        found.written = [[5] * plan.generate for _ in plan.openings]
        found.written_logprobs = [np.full(plan.generate, -2.0) for _ in plan.openings]
        if others:
            found.own[0] = [np.full(len(ids) - 1, -3.0) for ids in others]
        return found

    monkeypatch.setattr(eval_text, "in_a_process", engine)
    out = tmp_path / "report.json"
    options = [
        "--adapter",
        adapter,
        "--text",
        base / "text.txt",
        "--lengths",
        "64,128",
        "--out",
        out,
    ]
    options += ["--rows", 2, "--openings", 2, "--generate", 20, "--scored", 16, "--tasks", ""]
    eval_text.main([str(base), *map(str, options), "--dtype", "float32"])
    rows = {row["arm"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["dms", "dms_fp8", "window", "auto", "dms, PyTorch", "random eviction"]
    window = rows["window"]["settings"]
    assert window == {"window": 63, "alpha_offset": eval_text.NEVER}  # 127 tokens, half of them
    assert asked[-1][0] == ("auto", None) and len(asked[-1][1]) == 6
    assert rows["dms"]["generation"]["kl"] == pytest.approx(1.0)
    assert "generation" not in rows["auto"] and set(rows["dms"]["text"]) == {"64", "128"}
    assert rows["random eviction"]["text"]["128"]["perplexity"] > 1


@pytest.mark.parametrize(
    ("arms", "message"),
    [("dms,int1", "int1: arms are"), ("window,dms", "must come before")],
)
def test_arms_that_cannot_run_are_refused(tmp_path, capsys, arms, message):
    with pytest.raises(SystemExit):
        eval_text.parse_args(["B", "--adapter", "A", "--text", "T", "--out", "O", "--arms", arms])
    assert message in capsys.readouterr().err
