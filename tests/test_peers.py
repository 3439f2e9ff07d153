"""Peers are measured in processes of their own, and one that does not run says why."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "peers"))
import run as peers

HERE = peers.HERE

PEER = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from load import run, timed

def measure(load):
    asked = []
    seconds = timed(asked.append, load.tokens)
    return {{"seconds": seconds, "asked": asked, "prompts": load.prompts(7)}}

run("torch", measure)
"""


SLOW = f"""
import json, sys, time
sys.path.insert(0, {str(HERE)!r})
from load import run

def wait(load):
    time.sleep(600)

# Of its time 8 seconds are left now, however long the imports took.
sys.argv[1] = json.dumps(json.loads(sys.argv[1]) | {{"until": time.time() + 8}})
run("torch", wait)
"""


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Of a peer that runs, one that lacks its package, and one that was measured before."""
    (tmp_path / "model" / "dms").mkdir(parents=True)
    model = {"shape": "tiny", "layers": 2, "window": 16}
    (tmp_path / "model" / "dms" / "synthetic.json").write_text(json.dumps(model))
    (tmp_path / "quick.py").write_text(PEER)
    (tmp_path / "absent.py").write_text("import no_such_package")
    (tmp_path / "slow.py").write_text(SLOW)
    out = tmp_path / "peers.json"
    out.write_text(json.dumps([{"peer": "old", "tok_s": 1.0}, {"peer": "quick", "tok_s": 2.0}]))
    monkeypatch.setattr(peers, "HERE", tmp_path)
    command = ["run.py", "--model", str(tmp_path / "model"), "--out", str(out), "--commit", "c"]
    command += ["--peers", "quick,absent", "--batch", "3", "--prompt", "5", "--tokens", "9"]
    monkeypatch.setattr(sys, "argv", command)
    peers.main()
    return json.loads(out.read_text())


def test_a_peer_is_timed_after_a_short_generation(rows):
    old, quick, _ = rows
    assert old == {"peer": "old", "tok_s": 1.0}
    assert quick["asked"] == [4, 9]
    assert quick["tok_s"] == pytest.approx(3 * 9 / quick["seconds"])
    assert [len(prompt) for prompt in quick["prompts"]] == [5, 5, 5]
    assert (quick["layers"], quick["commit"]) == (2, "c")


def test_a_peer_without_its_package_says_so(rows):
    absent = rows[-1]
    assert absent["error"] == "exit code 1: ModuleNotFoundError: No module named 'no_such_package'"
    assert "tok_s" not in absent


def test_a_peer_that_takes_too_long_says_what_it_was_at(rows, monkeypatch, tmp_path):
    argv = [*sys.argv, "--peers", "slow", "--seconds", "500"]
    monkeypatch.setattr(sys, "argv", argv)
    peers.main()
    slow = json.loads((tmp_path / "peers.json").read_text())[-1]
    assert slow["error"] == "no result in 500 s"
    assert slow["stack"][0].endswith("slow.py:7 wait")
    assert slow["stack"][1].endswith("run")
