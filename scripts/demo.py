"""Serve a DMS checkpoint, stream a completion over a long prompt, and show what the cache holds.

Started by demo.sh. Two servers, one after the other: `vllm serve --kv-cache-dtype dms`, and the
same with eviction off. Their logs and a random checkpoint, if one is needed, go to build/demo.
"""

import importlib
import importlib.metadata
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import URLError
from urllib.request import urlopen

from openai import OpenAI

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "vllm_dms" / "assets" / "tiny"
WORK = ROOT / "build" / "demo"
MODEL_NAME = "dms-demo"
MAX_MODEL_LEN = 8192
START_TIMEOUT = 600  # seconds
# Arguments that suit a small model on any machine: nothing is compiled, and the pool has a fixed
# size, so that vLLM neither takes all memory nor measures what is free.
SERVER_ARGS = [
    *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1"),
    *("--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(256 << 20), "--kv-cache-dtype", "dms"),
]
SERVER_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
CPU_ENV = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def embedded_request() -> tuple[Path, dict[str, Any], str]:
    """-> checkpoint, arguments of the completion, what the answer should contain"""
    needles = importlib.import_module("examples.tiny.needles")
    prompt = needles.make_prompts(seed=0, length=4096, n=1)[0]
    question = prompt.user.splitlines()[-1]
    say(f"model: {EMBEDDED.relative_to(ROOT)}; after a long text it is asked: {question}")
    return EMBEDDED, {"prompt": prompt.text, "max_tokens": 32}, prompt.answers[0]


def random_request() -> tuple[Path, dict[str, Any], str]:
    sys.path.insert(0, str(ROOT / "tests"))
    say("model: random weights, so its text is noise; its memory is real")
    torch = importlib.import_module("torch")
    checkpoint = importlib.import_module("checkpoints").make_checkpoint(
        WORK / "random-checkpoint", window=64, dtype=torch.bfloat16
    )
    prompt = (ROOT / "LICENSE").read_text()[:6000]  # a token per byte
    return checkpoint, {"prompt": prompt, "max_tokens": 96, "extra_body": {"ignore_eos": True}}, ""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(model: Path, name: str, settings: dict[str, Any]) -> Iterator[tuple[OpenAI, Path]]:
    """A ready server's client and its log; the server is gone when the block ends, however."""
    port, log = free_port(), WORK / f"server-{name}.log"
    args = ["serve", str(model), *SERVER_ARGS, "--port", str(port)]
    args += ["--additional-config", json.dumps({"dms": settings})]
    say("vllm " + shlex.join(args))
    cpu = importlib.metadata.version("vllm").endswith("+cpu")
    env = os.environ | SERVER_ENV | (CPU_ENV if cpu else {})
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *args]
    with log.open("w") as out:
        # A process group of its own: Ctrl-C reaches this script alone, which then stops the server.
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none"), log
    finally:
        stop(process)


def wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    start, shown = time.monotonic(), 0
    while (elapsed := time.monotonic() - start) < START_TIMEOUT:
        if process.poll() is not None:
            fail(f"the server ended with status {process.returncode}", log)
        try:
            with urlopen(url, timeout=5):
                say(f"ready after {elapsed:.0f} s")
                return
        except (URLError, OSError):
            if elapsed >= shown + 5:
                shown = int(elapsed)
                say(f"starting, {shown} s ...")
            time.sleep(0.3)
    fail(f"the server is not ready after {START_TIMEOUT} s", log)


def fail(reason: str, log: Path) -> NoReturn:
    print(*log.read_text().splitlines()[-30:], sep="\n", file=sys.stderr)
    raise SystemExit(f"demo: {reason}; its whole log: {log}")


def stop(process: subprocess.Popen) -> None:
    """Ends the server and every process it started."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # no second Ctrl-C may leave it half stopped
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        say("the server does not stop by itself")
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    say("server stopped")
    catch_signals()


def catch_signals() -> None:
    """Every way to end this script goes through the `finally` that stops the server."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def from_log(log: Path, pattern: str) -> list[str]:
    """Lines of a server's log that match, without vLLM's prefix of process, time and file."""
    lines = (re.sub(r"^.*?\] ", "", line) for line in log.read_text().splitlines())
    return [line for line in lines if re.search(pattern, line)]


def ask(client: OpenAI, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """-> text, the request's counts as the server reports them"""
    request = {"model": MODEL_NAME, "temperature": 0, **request}
    start, pieces = time.monotonic(), []
    print("\n    ", end="")
    for chunk in client.completions.create(**request, stream=True):
        pieces.append(chunk.choices[0].text)
        visible = (c if c.isprintable() else "\n    " if c == "\n" else "." for c in pieces[-1])
        print("".join(visible), end="", flush=True)
    print(f"\n\ndemo: streamed in {time.monotonic() - start:.1f} s")
    # vLLM 0.32 leaves kv_transfer_params out of a stream, hence the same request once more.
    whole = client.completions.create(**request)
    counts = (whole.model_extra or {})["kv_transfer_params"]["dms"]
    counts["prompt_tokens"] = whole.usage.prompt_tokens
    return "".join(pieces), counts


def main() -> None:
    catch_signals()
    WORK.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(ROOT))
    embedded = (EMBEDDED / "config.json").is_file()
    model, request, expected = embedded_request() if embedded else random_request()
    rows = {}
    for title, name, settings in (
        ("DMS", "dms", {"log_interval": 0.2}),
        ("eviction off", "no-eviction", {"evict": False, "log_interval": 0.2}),
    ):
        print()
        say(f"{len(rows) + 1}/2 {title}")
        with server(model, name, settings) as (client, log):
            for line in from_log(log, r"^DMS cache:|^  (storage|pool|requests of) "):
                print(f"    {line}")
            text, counts = ask(client, request)
            for line in from_log(log, "^DMS: live compression")[-1:]:
                say(f"the server's last report: {line}")
        if expected:
            say(f"expected in the answer: {expected}: {'found' if expected in text else 'MISSING'}")
        rows[title] = counts
    print()
    say(f"at the end of the request of {counts['prompt_tokens']} prompt tokens")
    print(f"    {'':14}{'live tokens':>14}{'of':>8}{'compression':>14}{'blocks held':>14}")
    for title, row in rows.items():
        print(
            f"    {title:14}{row['live_tokens']:14.1f}{row['dense_tokens']:8}"
            f"{row['compression']:13.2f}x{row['blocks']:14}"
        )
    print("    (tokens held: mean over layers and KV heads)")


if __name__ == "__main__":
    main()
