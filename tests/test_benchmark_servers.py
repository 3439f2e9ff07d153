"""A benchmark's servers and clients end in time, say why, and are those that were started."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import processes
import through_server
from arms import ARMS
from benchmark_options import args_of, options
from processes import RunError


def test_a_stock_arm_has_no_plugin_and_no_arm_more_time_than_there_is(tmp_path):
    log, shown = tmp_path / "x.log", "import os; print(repr(os.environ['VLLM_PLUGINS']))"
    for arm, plugins in (("bf16", "''\n"), ("dms", "'dms'\n")):
        processes.run(ARMS[arm], [sys.executable, "-c", shown], log, time.monotonic() + 60)
        assert log.read_text() == plugins
    with pytest.raises(RunError, match=r"out of time: see x\.log"):
        processes.run(ARMS["bf16"], ["sleep", "60"], log, time.monotonic() + 0.5)
    with pytest.raises(RunError, match="exit code 1: OSError: first"):
        failing = "print(' WARNING ImportError: no'); print('OSError: first'); raise KeyError('x')"
        processes.run(ARMS["bf16"], [sys.executable, "-uc", failing], log, time.monotonic() + 60)


def test_one_client_answers_for_each_command_and_ends_with_the_run(tmp_path):
    client = through_server.Client(tmp_path / "client.log")
    deadline = time.monotonic() + 120
    with pytest.raises(RunError, match=r"SystemExit: 2: see x\.log"):
        client.run(["--no-such-flag"], tmp_path / "x.log", deadline)
    with pytest.raises(RunError, match=r"out of time before y\.log"):
        client.run(REFUSED, tmp_path / "y.log", time.monotonic())
    assert not (tmp_path / "y.log").exists()
    with pytest.raises(RunError, match=r"ValueError: --max-concurrency .*: see y\.log"):
        client.run(REFUSED, tmp_path / "y.log", deadline)
    processes.stop_all()
    assert client.process.poll() is not None
    with pytest.raises(RunError, match=r"the client ended: see z\.log"):
        client.run(REFUSED, tmp_path / "z.log", deadline)


def test_a_late_answer_is_not_the_next_command_s(tmp_path):
    client = through_server.Client(tmp_path / "client.log")
    os.mkfifo(tmp_path / "x.log")  # that nobody reads: the command does not end
    with pytest.raises(RunError, match=r"out of time: see x\.log"):
        client.run(REFUSED, tmp_path / "x.log", time.monotonic() + 0.1)
    with pytest.raises(RunError, match=r"the client ended: see y\.log"):
        client.run(REFUSED, tmp_path / "y.log", time.monotonic() + 120)


REFUSED = ["--model", "x", "--max-concurrency", "0"]


class Served:
    """A server's measurement whose processes do nothing and whose client saved ``client``."""

    def __init__(self, monkeypatch, out, client=None, names=None):
        self.out, self.waiting = out, (sys.executable, "-c", "import time; time.sleep(60)")
        monkeypatch.setattr(through_server, "CLI", self.waiting)
        monkeypatch.setattr(
            through_server.Server, "ask", lambda server, path, *_, **__: names or server.name
        )
        monkeypatch.setattr(through_server.Server, "live", lambda *_: {})
        saved = out / "bf16-server-first-request-1.json"
        monkeypatch.setattr(
            through_server.Client, "run", lambda *_: saved.write_text(json.dumps(client))
        )

    def row(self):
        chosen = options(out=self.out, workloads="first-request")
        engine = {"arm": "bf16", "args": args_of("bf16", chosen)[0]}
        rows = through_server.measure(
            ARMS["bf16"], ["first-request"], engine, chosen, time.monotonic() + 60
        )
        assert next(rows) == {}
        return next(rows)


def test_a_server_that_does_not_start_says_why(monkeypatch, tmp_path):
    server = Served(monkeypatch, tmp_path)
    monkeypatch.setattr(
        through_server, "CLI", (sys.executable, "-c", "raise ValueError('no such flag')")
    )
    monkeypatch.setattr(through_server.Server, "ask", refuse)
    with pytest.raises(RunError, match="did not start: ValueError: no such flag"):
        server.row()


def refuse(*args, **kwargs):
    raise ConnectionRefusedError


def test_another_server_on_the_port_is_not_measured(monkeypatch, tmp_path):
    with pytest.raises(RunError, match="another server answers"):
        Served(monkeypatch, tmp_path, names="another").row()


def test_the_first_request_stands_beside_the_tenth_if_all_were_answered(monkeypatch, tmp_path):
    client = {"completed": 10, "failed": 0, "output_throughput": 5.0, "duration": 2.0}
    client |= {"ttfts": [0.2, *[0.1] * 9], "mean_ttft_ms": 7.0}
    row = Served(monkeypatch, tmp_path, client).row()
    assert row["first_over_tenth"] == pytest.approx(2) and row["mean_ttft_ms"] == 7.0
    assert row["server_did_before"] == []
    with pytest.raises(RunError, match="9 of 10 requests were answered"):
        Served(monkeypatch, tmp_path, client | {"failed": 1, "completed": 9}).row()
