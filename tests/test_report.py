"""The README's results are what the measured rows say."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import report


def row(arm, workload="decode-8k", run_id="r1", concurrency=8, **figures):
    return {
        "arm": arm,
        "workload": workload,
        "run_id": run_id,
        "concurrency": concurrency,
        "decode_tok_s": None,
        "prefill_tok_s": None,
        "requests_held": None,
        "preemptions": None,
        "live_compression": None,
        "gpu": "a card",
        "commit": "abc",
        **figures,
    }


def lines(rows):
    return report.table(rows).splitlines()[2:]


def test_a_losing_row_stays_and_its_ratio_is_below_one():
    rows = [row("bf16", decode_tok_s=1000.0), row("dms", decode_tok_s=900.0)]
    assert lines(rows) == [
        "| decode at 8K, concurrency 8, tok/s | 1,000 | - | 900 | 0.90 | - | - | - |"
    ]


def test_rows_of_two_runs_are_both_shown_without_a_ratio():
    old, new = row("fp8", decode_tok_s=10.0), row("dms_fp8", run_id="r2", decode_tok_s=9.0)
    (line,) = lines([old, new])
    assert line.endswith("| 10 | 9 | - |")


def test_a_pair_of_one_run_beats_a_newer_single_row():
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


def test_lines_are_sorted_by_workload_then_concurrency():
    rows = [row("dms", concurrency=c, decode_tok_s=1.0) for c in (64, 8, 1)]
    rows.append(row("dms", "capacity-8k", concurrency=99, requests_held=99))
    titles = [line.split("|")[1].strip() for line in lines(rows)]
    assert titles == [
        "decode at 8K, concurrency 1, tok/s",
        "decode at 8K, concurrency 8, tok/s",
        "decode at 8K, concurrency 64, tok/s",
        "requests of 8K held at once",
    ]


def test_server_rows_have_lines_of_their_own_by_rate():
    rows = [row("dms", "serve-1024-512", concurrency=64, decode_tok_s=1.0, request_rate=rate)
            for rate in ("8", "inf")]  # fmt: skip
    rows[1]["completed"] = 128
    assert [line.split("|")[1].strip() for line in lines(rows)] == [
        "`vllm bench serve`, 1024 in, 512 out, concurrency 64, 128 prompts, tok/s",
        "`vllm bench serve`, 1024 in, 512 out, concurrency 64, 8 requests/s, tok/s",
    ]


@pytest.mark.parametrize("wrong", [{"workload": "decode-9k"}, {"arm": "dense"}], ids=str)
def test_no_row_is_dropped_silently(wrong):
    with pytest.raises(ValueError, match="in the report"):
        report.table([row("dms", decode_tok_s=1.0) | wrong])


def run_lines(rows):
    return report.runs_table(rows).splitlines()[2:]


def test_a_run_says_which_lines_are_its_and_what_was_live():
    rows = [row("dms", "saturated-8k", decode_tok_s=1.0, live_compression=5.514, pool_bytes=2**31)]
    rows.append(row("dms", "prefill-32k", live_compression=7.0))
    assert run_lines(rows) == [
        "| `r1` | prefill-32k, saturated-8k | abc | 2.0 GiB | `dms` 5.51 |",
    ]


def test_a_run_says_at_which_concurrencies_a_line_is_its():
    rows = [row("dms", concurrency=c, decode_tok_s=1.0) for c in (8, 1)]
    rows.append(row("dms", run_id="r2", concurrency=64, decode_tok_s=1.0))
    first, second = run_lines(rows)
    assert "`r1` | decode-8k at 1/8 |" in first and "`r2` | decode-8k at 64 |" in second


def test_facts_stand_once_if_all_runs_share_them():
    rows = [row("dms"), row("dms", run_id="r2", dialect="nvidia-borrowed")]
    section = report.runs_section(rows)
    assert section.count("a card") == 1 and "All runs: a card; " in section
    first, second = run_lines(rows)
    assert "nvidia-adapter decisions" in first and "nvidia-borrowed decisions" in second
    assert "a card" in report.results_section(rows)


def empty_page():
    sections = ("results", "kernels", "runs")
    return "\n".join([mark for name in sections for mark in report.marks(name)] + [""])


def kernel(storage, batch, **figures):
    times = {"both_us": 9.16, "decode_us": 7.31, "share_of_copy": 0.871, "store_megabytes": 1.0}
    return {"kernel": "decode", "storage": storage, "batch": batch, **times, **figures}


def test_the_table_of_kernels_has_a_line_per_batch():
    rows = [kernel("bf16", 64, copy_us=5.0), kernel("bf16", 8), kernel("fp8", 8)]
    rows.append({"kernel": "prefill"})
    run = {"rows": rows, "gpu": "a card", "commit": "abc", "copy_bytes_per_s": 4.236e12}
    text = report.kernels_section(run)
    assert text.splitlines()[2:] == [
        "| 8 | 9.2 | 7.3 | - | 87% | 9.2 | 7.3 | - | 87% |",
        "| 64 | 9.2 | 7.3 | 5.0 | 87% | - | - | - | - |",
        "",
        "a card, which copies at 4.24 TB/s; commit abc.",
    ]
    rows[0]["both_us"] = 7.0
    assert "in doubt: `dms` at 64" in report.kernels_section(run)
    del rows[0]["store_megabytes"]
    assert "stores had no gate yet" in report.kernels_section(run)


def test_without_rows_the_section_is_empty(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(empty_page())
    missing = ["--summary", str(tmp_path / "none.json"), "--readme", str(readme)]
    missing += ["--served-readme", str(readme), "--kernels", str(tmp_path / "none.json")]
    assert report.main([*missing, "--check"]) == 0


@pytest.fixture
def paths(tmp_path):
    names = ("README.md", "summary.json", "serving.png", "served.md")
    readme, summary, plot, served = (tmp_path / name for name in names)
    for page in (readme, served):
        page.write_text(f"before\n{empty_page()}after\n")
    rows = [row("bf16", decode_tok_s=10.0), row("dms", decode_tok_s=30.0)]
    rows.append(row("dms", "capacity-8k", requests_held=5))
    rows.append(row("dms", "serve-8-4", decode_tok_s=7.0, mean_tpot_ms=8.04, run_id="r2"))
    summary.write_text(json.dumps(rows))
    return ["--readme", str(readme), "--summary", str(summary), "--plot", str(plot),
            "--served-readme", str(served)]  # fmt: skip


def test_check_fails_until_the_report_was_made_and_after_a_change(paths):
    pytest.importorskip("matplotlib")
    assert report.main([*paths, "--check"]) == 1
    assert report.main(paths) == 0
    text = Path(paths[1]).read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert report.main([*paths, "--check"]) == 0
    summary = Path(paths[3])
    summary.write_text(summary.read_text().replace("30.0", "31.0"))
    assert report.main([*paths, "--check"]) == 1


def test_rows_of_the_server_have_a_page_of_their_own(paths):
    pytest.importorskip("matplotlib")
    report.main(paths)
    readme, served = (Path(paths[i]).read_text() for i in (1, 7))
    assert "bench serve" not in readme and "r2" not in readme
    assert "| 7 (8.0 ms/token) |" in served and "held at once" not in served
    assert "| `r1` |" in served and "| `r2` |" in served
    Path(paths[7]).write_text(served.replace("7 (", "9 ("))
    assert report.main([*paths, "--check"]) == 1


def test_the_plot_is_the_same_each_time(paths):
    pytest.importorskip("matplotlib")
    plot = Path(paths[5])
    report.main(paths)
    first = plot.read_bytes()
    report.main(paths)
    assert plot.read_bytes() == first


def test_a_readme_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="results:begin"):
        report.with_section("text", "results", "section")
