"""A real `vllm serve`: two front ends before one engine, seen from outside."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import vllm

import vllm_dms

TINY = Path(vllm_dms.__file__).parent / "assets" / "tiny"
WINDOW = 64  # of that checkpoint
START_SECONDS = 600  # when other tests of the machine run beside it
ARGS = [
    *("--served-model-name", "tiny", "--host", "127.0.0.1", "--dtype", "float32"),
    *("--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(32 << 20), "--gpu-memory-utilization", "0.3"),
    *("--kv-cache-dtype", "dms", "--api-server-count", "2"),
]
ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # for /pause
}
LONG = "The tired guest tasted the soup in the kitchen, because the storm came. " * 6


class Server:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def open(self, path: str, **body):
        """A connection of its own, so that either front end may answer."""
        data = json.dumps({"model": "tiny", "temperature": 0, **body}).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        return urlopen(request, timeout=120)

    def post(self, path: str, **body) -> str:
        with self.open(path, **body) as answer:
            return answer.read().decode()

    def complete(self, prompt, **body) -> dict:
        body = {"max_tokens": 20, "ignore_eos": True, **body}
        return json.loads(self.post("/v1/completions", prompt=prompt, **body))

    def metrics(self) -> dict[str, float]:
        with urlopen(self.url + "/metrics", timeout=60) as answer:
            text = answer.read().decode()
        samples = re.findall(r'^vllm:dms_(\w+){.*engine="0".*} (\S+)$', text, re.M)
        assert len(dict(samples)) == len(samples), "one engine, so one sample of each"
        return {name: float(value) for name, value in samples}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(TINY)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *ARGS, "--port", str(port)],
            env=os.environ | ENV,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, OSError):
                time.sleep(0.2)
        yield Server(port)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_metrics_add_up_over_front_ends_and_are_what_clients_were_told(server):
    before = server.metrics()
    assert before["info"] == 1 and before["evicted_tokens_total"] == 0
    figures = [server.complete(LONG)["kv_transfer_params"]["dms"] for _ in range(8)]
    after = server.metrics()
    past = sum(f["dense_tokens"] - (WINDOW + 1) for f in figures)
    evicted = sum(f["dense_tokens"] - f["live_tokens"] for f in figures)
    # The last steps' reports can come when the request is gone.
    slack = 4 * len(figures)
    assert past - slack <= after["eligible_tokens_total"] <= past
    assert evicted - slack <= after["evicted_tokens_total"] <= evicted + 0.1
    assert after["held_blocks"] == after["live_tokens"] == after["dense_tokens"] == 0
    assert after["usable_blocks"] > 0


# Where a client finds the figures of its request.


@pytest.mark.slow
def test_a_list_of_prompts_has_the_figures_of_its_first(server):
    for prompts in ([LONG, "short"], ["short", LONG]):
        figures = server.complete(prompts)["kv_transfer_params"]["dms"]
        assert (figures["dense_tokens"] > 100) == (prompts[0] == LONG)


@pytest.mark.slow
def test_an_answer_ended_by_a_stop_string_has_none(server):
    """The front end finds the string and aborts the request."""
    answer = server.complete(LONG, stop=["."], max_tokens=60)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["kv_transfer_params"] is None


@pytest.mark.slow
def test_structured_output_keeps_to_its_grammar_after_evictions(server):
    free = server.complete(LONG)["choices"][0]["text"]
    grammar = {"regex": "[0-9]{4} or [0-9]{4}"}
    answer = server.complete(LONG, ignore_eos=False, structured_outputs=grammar)
    assert re.fullmatch(grammar["regex"], answer["choices"][0]["text"])
    assert not re.match(grammar["regex"], free)
    assert answer["kv_transfer_params"]["dms"]["compression"] > 1


@pytest.mark.slow
def test_a_paused_engine_goes_on_where_it_was(server):
    body = {"prompt": LONG, "max_tokens": 200, "ignore_eos": True}
    start = time.monotonic()
    undisturbed = server.complete(**body)["choices"][0]["text"]
    seconds = time.monotonic() - start
    stream = server.open("/v1/completions", stream=True, **body)
    with stream, ThreadPoolExecutor(1) as pool:
        first = stream.readline()  # once it is on its way
        server.post("/pause?mode=keep")
        try:
            rest = pool.submit(stream.read)
            time.sleep(seconds)
            paused = not rest.done()
        finally:
            server.post("/resume")
        chunks = events_of((first + rest.result()).decode())
    assert paused
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == undisturbed


def events_of(stream: str) -> list[dict]:
    return [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]


@pytest.mark.slow
def test_a_stream_has_them_where_it_ends_if_vllm_passes_them_on(server):
    body = {"max_tokens": 8, "ignore_eos": True, "stream": True}
    message = {"messages": [{"role": "user", "content": LONG}]}
    for path, said in (
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/chat/completions", message),
    ):
        chunks = events_of(server.post(path, **said, **body))
        found = [c["kv_transfer_params"] for c in chunks if c.get("kv_transfer_params")]
        assert len(found) == (not vllm.__version__.startswith("0.32."))
        if found:
            assert found[0]["dms"]["dense_tokens"] > WINDOW
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    last = events_of(server.post("/v1/responses", input=LONG, max_output_tokens=8, stream=True))[-1]
    # The latter from vLLM 0.33 on, because of max_output_tokens.
    assert last["type"] in ("response.completed", "response.incomplete")
    assert last["response"]["kv_transfer_params"]["dms"]["dense_tokens"] > WINDOW
