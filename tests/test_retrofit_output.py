"""What a retrofit writes: an adapter by default, a whole checkpoint where the base has changed."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from retrofit_runs import FAMILIES, dense, run  # noqa: F401 - dense is a fixture

from vllm_dms import verify
from vllm_dms.adapters import is_adapter_dir, read_adapter, tensor_names
from vllm_dms.reference import ReferenceModel
from vllm_dms.retrofit import __main__ as cli
from vllm_dms.retrofit import output


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_over_its_base_is_the_merged_checkpoint(dense, tmp_path, family):  # noqa: F811
    source, adapter, whole = dense(family), tmp_path / "adapter", tmp_path / "whole"
    run(source, adapter, form=())
    run(source, whole)
    assert is_adapter_dir(adapter)
    assert read_adapter(adapter).base == str(source)
    ids = torch.randint(1, 257, (80,), generator=torch.Generator().manual_seed(1))
    found, truth = (ReferenceModel.from_dir(p).forward(ids) for p in (adapter, whole))
    assert torch.equal(found.logits, truth.logits) and truth.evict.any()
    named = tmp_path / "named"
    run(source, named, "--base-name", "Some/Model", form=())
    assert read_adapter(named).base == "Some/Model"


def test_verify_reads_an_adapter_and_records(dense, tmp_path, capsys):  # noqa: F811
    """Over its base, whose tokenizer it takes; a line of a .jsonl is a document, not text."""
    source, adapter = dense("qwen3"), tmp_path / "adapter"
    run(source, adapter, "--base-name", "Some/Model", form=())
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "The quick brown fox."}\n{"text": "The lazy dog."}\n')
    settings = ["--text", str(texts), "--max-kl", "99"]
    assert verify.main([str(adapter), "--base", str(source), *settings]) == 0
    # 20 and 13 bytes, and the empty line between two documents
    assert "over 35 tokens" in capsys.readouterr().out
    for arguments, message in (
        ([str(adapter), *settings], "Some/Model, which is no directory here"),
        ([str(source), "--base", str(source), *settings], "is none: leave it out"),
    ):
        with pytest.raises(SystemExit):
            verify.main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--dialect", "borrowed"], ["--train", "all"]], ids=str)
def test_what_changes_the_base_is_written_whole(dense, tmp_path, options):  # noqa: F811
    run(dense("qwen3", attention_bias=False), tmp_path, *options, form=())
    assert not is_adapter_dir(tmp_path)
    assert ReferenceModel.from_dir(tmp_path).dms is not None


def test_a_tied_head_is_written_once(dense, tmp_path):  # noqa: F811
    """Also where weights are trained in another dtype than they are saved in."""
    source = dense("qwen3", attention_bias=False)
    run(source, tmp_path, "--save-dtype", "bfloat16")
    assert "lm_head.weight" not in tensor_names(tmp_path)


def test_nothing_is_overwritten(dense, tmp_path, capsys):  # noqa: F811
    """Least of all the base itself, whose config.json has the name of an adapter's."""
    source, done = dense("qwen3", attention_bias=False), tmp_path / "done"
    before = {path: path.read_bytes() for path in source.iterdir()}
    file = tmp_path / "file"
    file.touch()
    assert run(source, done, "--lr", "1e-9", form=()) == cli.MISSED
    capsys.readouterr()
    for out, message in (
        (source, "has other files in it"),
        (file, "Not a directory"),
        (file / "below", "Not a directory"),
        (done, "has a run in it (training/summary.json): give --resume"),
    ):
        with pytest.raises(SystemExit) as refused:
            run(source, out, form=())
        assert refused.value.code == cli.REFUSED
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1  # and not all options
    assert before == {path: path.read_bytes() for path in source.iterdir()}


def test_a_finished_run_is_told_again(dense, tmp_path, capsys):  # noqa: F811
    """With its exit code; with other settings it would be another run."""
    source = dense("qwen3", attention_bias=False)
    assert run(source, tmp_path, "--lr", "1e-9", form=()) == cli.MISSED
    capsys.readouterr()
    assert run(source, tmp_path, "--lr", "1e-9", "--resume", form=()) == cli.MISSED
    said = capsys.readouterr().out
    assert "nothing to resume" in said and "MISSED: 1.00x live" in said
    with pytest.raises(SystemExit):
        run(source, tmp_path, "--lr", "1e-9", "--tau", "0.2", "--resume", form=())
    assert "is finished, with another tau" in capsys.readouterr().err


def test_a_full_disk_is_refused_before_training(dense, tmp_path, monkeypatch, capsys):  # noqa: F811
    source = dense("qwen3", attention_bias=False)
    trained = 2 * (2 * 64 + 64)  # layers, each 2 heads and a norm of 64
    needed = 2 * 12 * trained + 4 * trained + output.SMALL_FILES
    usage = SimpleNamespace(free=needed - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(SystemExit):
            run(source, tmp_path, form=())
        assert "make room" in capsys.readouterr().err
        usage.free = needed
        assert run(source, tmp_path, form=()) == cli.OK
