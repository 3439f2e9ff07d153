"""What a retrofit writes: an adapter by default, a whole checkpoint where the base has changed."""

import pytest
import torch
from retrofit_runs import FAMILIES, dense, run  # noqa: F401 - dense is a fixture

from vllm_dms import verify
from vllm_dms.adapters import is_adapter_dir, read_adapter, tensor_names
from vllm_dms.reference import ReferenceModel


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
    run(source, adapter, "--base-name", "Some/Model", form=())
    assert read_adapter(adapter).base == "Some/Model"


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
