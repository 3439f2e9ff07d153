"""The verify command tells the rule, measures what the reference says, and fails when it should."""

import pytest
import torch
from checkpoints import random_tokens

from vllm_dms import verify
from vllm_dms.models.families import FAMILIES
from vllm_dms.reference import ReferenceModel, live_counts

LENGTH = 300


@pytest.fixture
def text(tmp_path):
    """A file of printable bytes: a token each."""
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(33 + t % 90) for t in random_tokens(LENGTH, seed=3)))
    return path


def run(path, text, *extra):
    return verify.main([str(path), "--text", str(text), *extra])


@pytest.mark.parametrize(
    ("dialect", "words"),
    [
        (
            "nvidia-borrowed",
            ["borrowed query channel", "window    16", "shift     1", "zero      both", "8x"],
        ),
        ("nvidia-adapter", ["adapter weights", "window    16", "shift     1", "8x"]),
        ("fastdms", ["FastDMS", "window    16", "shift     0", "zero      before", "8x"]),
    ],
)
def test_the_rule_is_told(checkpoint, text, capsys, dialect, words):
    assert run(checkpoint(dialect), text, "--max-kl", "99") == 0
    out = capsys.readouterr().out
    assert all(w in out for w in words) and out.endswith("OK\n")
    assert ("zero " in out) == (dialect != "nvidia-adapter")  # which borrows no channel


def test_the_command_calls_itself_what_it_is_called(capsys):
    with pytest.raises(SystemExit):
        verify.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: vllm-dms verify ")


@pytest.mark.parametrize("arch", [family.architecture for family in FAMILIES])
def test_every_family_is_verified(checkpoint, text, capsys, arch):
    assert run(checkpoint("nvidia-borrowed", arch=arch), text, "--max-kl", "99") == 0
    assert capsys.readouterr().out.endswith("OK\n")


def test_the_first_affected_position_follows_the_window():
    e = torch.zeros(2, 1, 10, dtype=torch.bool)
    e[1, 0, 3] = True
    # W = 2: key 3 is hidden from queries 6, 7, ...
    assert verify.first_affected(e, window=2) == 6
    assert verify.first_affected(e, window=20) == 10
    assert verify.first_affected(torch.zeros_like(e), window=2) == 10


def test_kl_is_that_of_two_forwards(checkpoint):
    path, ids = checkpoint("nvidia-adapter"), random_tokens(LENGTH, seed=1)
    report = verify.measure(path, ids)
    on = ReferenceModel.from_dir(path).forward(ids)
    off = ReferenceModel.from_dir(path, {"evict": False}).forward(ids)
    start = LENGTH - len(report.kl)
    assert torch.equal(on.logits[:start], off.logits[:start])
    assert not torch.equal(on.logits[start], off.logits[start])
    p, q = (x.logits[start:].double().log_softmax(-1) for x in (off, on))
    expected = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(report.kl.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(report.live, live_counts(on.evict, 16))


def test_a_large_kl_fails(checkpoint, text, capsys):
    assert run(checkpoint("nvidia-borrowed"), text, "--max-kl", "0.001") == 1
    assert "is above --max-kl 0.001" in capsys.readouterr().out


@pytest.mark.parametrize("why", [{"disable_eviction": True}, {"window": LENGTH}], ids=str)
def test_nothing_evicted_fails(checkpoint, text, capsys, why):
    assert run(checkpoint("nvidia-borrowed", **why), text) == 1
    assert "nothing is evicted" in capsys.readouterr().out


def test_errors_name_the_setting(checkpoint, tmp_path, capsys):
    for args, message in [
        ([str(tmp_path)], "no config.json"),
        ([str(checkpoint("dense"))], "not a DMS checkpoint"),
        ([str(checkpoint("fastdms")), "--text", "missing.txt"], "there is no such file"),
    ]:
        with pytest.raises(SystemExit) as stop:
            verify.main(args)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
