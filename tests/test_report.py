"""The READMEs' results are what the measured rows say."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import report
from bench_serving import WORKLOADS


def row(arm, workload="decode-8k", run_id="r1", concurrency=8, **figures):
    about = {"gpu": "a card", "commit": "abc", "pool_bytes": 2**31}
    return {"arm": arm, "workload": workload, "run_id": run_id, "concurrency": concurrency,
            **about, **figures}  # fmt: skip


def lines(rows):
    return report.table(rows).splitlines()[2:]


def test_a_losing_row_stays_and_its_ratio_is_below_one():
    rows = [row("bf16", decode_tok_s=1000.0), row("dms", decode_tok_s=900.0)]
    assert lines(rows) == [
        "| decode at 8K, concurrency 8, tok/s | 1,000 | - | 900 | 0.90 | - | - | - |"
    ]


def test_a_ratio_compares_arms_of_one_run_only():
    old, new = row("fp8", decode_tok_s=10.0), row("dms_fp8", run_id="r2", decode_tok_s=9.0)
    assert lines([old, new])[0].endswith("| 10 | 9 | - |")
    pair = [row("bf16", decode_tok_s=10.0), row("dms", decode_tok_s=30.0)]
    (line,) = lines([*pair, row("dms", run_id="r2", decode_tok_s=50.0)])
    assert "| 10 | - | 30 | 3.00 |" in line


def test_preemptions_and_unfinished_runs_are_shown():
    rows = [
        row("bf16", "saturated-8k", concurrency=90, decode_tok_s=5.0, preemptions=3),
        row("dms", "reason-1k-8k", concurrency=64, decode_tok_s=7.0, complete=False),
        row("bf16", "reason-1k-8k", concurrency=64, decode_tok_s=2.0, requests_held=20),
    ]
    saturated, reason = lines(rows)
    assert "5 (90 requests, 3 preempted)" in saturated
    assert "7 (cut short)" in reason and "2 (20 held)" in reason


def test_a_table_is_of_one_model_and_says_what_was_cut(tmp_path):
    whole = {"model": "Qwen3-8B", "weights_dtype": "bfloat16", "layers": 36}
    assert report.subject(whole) == "Qwen3-8B shape, bfloat16 weights"
    assert report.subject(whole | {"layers": 12}) == "Qwen3-8B shape of 12 layers, bfloat16 weights"
    for other in ({"weights_dtype": "fp8"}, {"layers": 12}, {"model": "Qwen3-30B-A3B"}):
        paths = [tmp_path / "1.json", tmp_path / "2.json"]
        for path, kind in zip(paths, (whole, whole | other), strict=True):
            path.write_text(json.dumps({"rows": [row("dms", decode_tok_s=1.0, **kind)]}))
            assert report.read_rows([path])
        with pytest.raises(ValueError, match=r"and of .*, which no table compares"):
            report.read_rows(paths)


def test_every_workload_has_lines_and_an_unknown_one_or_arm_is_refused(tmp_path):
    keys = {figure.key for workload in WORKLOADS for figure in report.figures_of(workload)}
    rows = [row("dms", workload, **dict.fromkeys(keys, 1.0)) for workload in WORKLOADS]
    shown = [line.split("|")[1].strip() for line in lines(rows)]
    assert len(shown) == len(set(shown)) > len(WORKLOADS)
    with pytest.raises(ValueError, match="'decode-9k' has no line in the report"):
        lines([row("dms", "decode-9k")])
    (tmp_path / "run.json").write_text(json.dumps({"rows": [row("dense")]}))
    with pytest.raises(ValueError, match="have no column in the report"):
        report.read_rows([tmp_path / "run.json"])


def test_a_run_says_what_is_shown_of_it_and_what_was_live():
    rows = [row("dms", concurrency=c, decode_tok_s=1.0, live_compression=5.514) for c in (8, 1)]
    rows += [row("dms", "prefill-32k", live_compression=7.0)]
    rows += [row("dms", run_id="r2", concurrency=64, decode_tok_s=1.0, dialect="x")]
    section = report.runs_section(rows)
    first, second = section.splitlines()[2:4]
    assert first == (
        "| `r1` | decode-8k at 1/8, prefill-32k; nvidia-adapter decisions | abc | 2.0 GiB | "
        "`dms` 5.51 |"
    )
    assert "decode-8k at 64; x decisions" in second and section.count("a card") == 1


def test_4_bit_caches_have_a_table_of_their_own_with_their_ratios_to_fp8(tmp_path):
    rows = [row("fp8", decode_tok_s=100.0), row("dms_fp8", decode_tok_s=200.0)]
    before = report.results_section(rows)
    rows.append(row("dms_int4", decode_tok_s=250.0))
    first, second, _ = report.results_section(rows).split("\n\n")
    assert before.startswith(first)
    assert second.splitlines() == [
        "| workload | FP8 | `dms_fp8` | `dms_int4` | / FP8 | / `dms_fp8` |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| decode at 8K, concurrency 8, tok/s | 100 | 200 | 250 | 2.50 | 1.25 |",
    ]
    # Of several runs that with most arms; what it lacks is of another, and not compared.
    rows += [row("int4_per_token_head", "capacity-8k", requests_held=66)]
    rows += [row(arm, "capacity-8k", run_id="r0", requests_held=9) for arm in ("fp8", "dms_int4")]
    rows += [row("turboquant_4bit_nc", run_id="r2", decode_tok_s=1.0)]
    rows += [row("fp8", run_id="r3", decode_tok_s=50.0)]
    (tmp_path / "run.json").write_text(json.dumps({"rows": rows}))
    section = report.results_section(report.read_rows([tmp_path / "run.json"]))
    assert section.split("\n\n")[1].splitlines()[2:] == [
        "| decode at 8K, concurrency 8, tok/s | 100 | 200 | 1 | - | - "
        "| - | - | - | 250 | 2.50 | 1.25 |",
        "| requests of 8K held at once | 9 | - | - | - | - | 66 | - | - | 9 | 1.00 | - |",
    ]
    again = [old | {"run_id": "r9", "decode_tok_s": 2 * old["decode_tok_s"]} for old in rows[:3]]
    assert "| 200 | 400 | 1 |" in report.results_section([*rows, *again])


def test_a_run_of_4_bit_caches_alone_is_shown():
    rows = [row("turboquant_4bit_nc", "capacity-8k", requests_held=51)]
    table, facts = report.results_section(rows).split("\n\n")
    assert table.splitlines()[2:] == ["| requests of 8K held at once | - | - | 51 | - | - |"]
    assert facts.startswith("a card") and "capacity-8k" in report.runs_section(rows)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A copy of what is published here."""
    pytest.importorskip("matplotlib")
    for name in ("README.md", "benchmarks/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(report.HERE.parent / name, tmp_path / name)
    shutil.copytree(report.HERE / "results", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(report, "HERE", tmp_path / "benchmarks")
    return tmp_path / "benchmarks" / "results"


def test_what_is_published_is_what_was_measured(published):
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("name", ["kernels", "20261121-110400"])
def test_a_changed_result_makes_what_is_published_stale(published, name):
    path = published / f"{name}.json"
    path.write_text(re.sub(r'("decode_us": |"decode_tok_s": )(?=\d)', r"\g<1>9", path.read_text()))
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0 == report.main(["--check"])
    png = (published / "serving.png").read_bytes()
    report.main([])
    assert (published / "serving.png").read_bytes() == png


def test_any_run_can_be_shown(published, capsys):
    before = (published.parent / "README.md").read_text()
    assert report.main([str(published / "20261121-084931.json")]) == 0
    assert "| decode at 8K, concurrency 64, tok/s |" in capsys.readouterr().out
    assert (published.parent / "README.md").read_text() == before


def test_a_kernel_slower_alone_than_with_its_store_is_in_doubt():
    decode = {"kernel": "decode", "storage": "bf16", "batch": 64, "both_us": 9.16, "decode_us": 9.5}
    run = {"rows": [{**decode, "share_of_copy": 0.871}], "gpu": "a card", "commit": "abc",
           "copy_bytes_per_s": 4.236e12}  # fmt: skip
    text = report.kernels_section(run)
    assert "| 64 | 9.2 | 9.5 | - | 87% | - | - | - | - |" in text
    assert "a card, which copies at 4.24 TB/s; commit abc" in text and "`dms` at 64" in text
