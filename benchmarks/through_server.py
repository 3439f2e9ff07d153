"""What `vllm bench serve` measures: a server of the arm answers all chosen workloads, one after the
other, in the order of SERVED.
"""

import contextlib
import json
import random
import re
import secrets
import select
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import processes
from arms import ARMS, Arm, flags
from processes import CLI, RunError
from record import Row


@dataclass(frozen=True)
class Served:
    """Random prompts, once for each load."""

    input_len: int
    output_len: int
    loads: tuple[tuple[int, int], ...]  # requests at once, requests in all
    range_ratio: float = 0.0  # lengths vary by this share around the above
    warmups: int = 0


SERVED = {
    "first-request": Served(1024, 16, ((1, 10),)),  # the first of a server that just started
    **{f"ttft-{n}": Served(n, 16, ((1, 20),), warmups=3) for n in (128, 512, 1024, 2048, 4096)},
    "serve-1024-512": Served(1024, 512, ((32, 128),)),
    "serve-128-128": Served(128, 128, ((64, 256),)),
    "serve-mixed": Served(2048, 2048, ((160, 160),), range_ratio=0.8),
    "serve-8192-512": Served(8192, 512, ((1, 4), (64, 64)), warmups=1),
}


class Server:
    """`vllm serve` for one arm. Only it answers to its name, so nothing else can be measured."""

    def __init__(self, arm: Arm, args: dict[str, Any], options: Namespace, log: Path) -> None:
        self.name, self.arm, self.options, self.log = secrets.token_hex(8), arm, options, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        others = {k: v for k, v in args.items() if k != "model"}
        others |= {"port": self.port, "served_model_name": self.name}
        others |= {"enable_prompt_tokens_details": True}  # what a cache had of a prompt
        self.command = [*CLI, "serve", args["model"], *flags(others)]
        self.process = processes.start(arm, self.command, log)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, body: dict[str, Any] | None = None, seconds: float = 120) -> str:
        data = json.dumps(body).encode() if body else None
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(self.url + path, data, headers), timeout=seconds) as response:
            return response.read().decode()

    def wait_until_ready(self, deadline: float) -> None:
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                names = self.ask("/v1/models", seconds=5)
            except OSError:  # nobody listens yet, or nobody answers
                time.sleep(0.5)
                continue
            if self.name not in names:
                raise RunError(f"another server answers on port {self.port}: try again")
            return
        raise RunError(f"the server did not start: {processes.first_error(self.log)}")

    def preemptions(self) -> int:
        """Since the server's start."""
        pattern = r"^vllm:num_preemptions_total\S* (\S+)$"
        counts = re.findall(pattern, self.ask("/metrics"), re.MULTILINE)
        return int(sum(float(count) for count in counts))

    def live(self, prompt_len: int) -> Row:
        """What the plugin reports of one prompt."""
        prompt = random.Random(self.options.seed).choices(range(100, 400), k=prompt_len)
        body = {"model": self.name, "prompt": prompt, "max_tokens": 4, "ignore_eos": True}
        answer = json.loads(self.ask("/v1/completions", body))
        dms = (answer.get("kv_transfer_params") or {}).get("dms") or {}
        return {"live_compression": dms.get("compression"), "live_tokens": dms.get("live_tokens")}

    def bench_arguments(self, work: Served, load: tuple[int, int]) -> list[str]:
        options = self.options
        client = {
            "backend": "vllm",
            "model": self.name,
            "tokenizer": options.model / self.arm.checkpoint,
            "port": self.port,
            "dataset-name": "random",
            "random-input-len": work.input_len // options.scale,
            "random-output-len": max(work.output_len // options.scale, 2),
            "random-range-ratio": work.range_ratio,
            "max-concurrency": load[0],
            "num-prompts": load[1],
            "num-warmups": work.warmups,
            "temperature": 1.0,  # random weights, greedily, repeat themselves
            "seed": options.seed,
        }
        saving = ("--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm")
        return [*saving, *flags(client)]

    def measure(
        self, client: "Client", workload: str, load: tuple[int, int], deadline: float
    ) -> Row:
        before = self.preemptions()
        saved = self.log.with_name(f"{self.log.stem}-{workload}-{load[0]}.json")
        arguments = self.bench_arguments(SERVED[workload], load)
        arguments += ["--result-dir", str(saved.parent), "--result-filename", saved.name]
        client.run(arguments, saved.with_suffix(".log"), deadline)
        if self.process.poll() is not None:
            raise RunError(f"the server ended: {processes.first_error(self.log)}")
        result = json.loads(saved.read_text())
        if result["failed"] or result["completed"] != load[1]:
            raise RunError(
                f"{result['completed']} of {load[1]} requests were answered: see {saved}"
            )
        row = row_of(workload, load, result) | {"preemptions": self.preemptions() - before}
        return row | self.live(SERVED[workload].input_len // self.options.scale)


class Client:
    """client.py in a process of its own, without a plugin. A command that does not end in time
    ends it, or its answer would be the next one's."""

    def __init__(self, log: Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, str(Path(__file__).with_name("client.py"))]
        self.process = processes.start(ARMS["bf16"], command, log, **pipes)

    def run(self, arguments: list[str], log: Path, deadline: float) -> None:
        stdin, stdout = self.process.stdin, self.process.stdout
        left = deadline - time.monotonic()
        if left <= 0:
            raise RunError(f"out of time before {log.name}")
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps([arguments, str(log)]), file=stdin, flush=True)
        if not select.select([stdout], [], [], left)[0]:
            processes.stop(self.process)
            raise RunError(f"out of time: see {log.name}")
        answer = stdout.readline().strip() or "the client ended"
        if answer != "0":
            raise RunError(f"{answer}: see {log.name}")


def row_of(workload: str, load: tuple[int, int], client: dict[str, Any]) -> Row:
    """``client``: what `vllm bench serve` saved"""
    row = {"workload": workload, "concurrency": load[0], "completed": client["completed"]}
    row |= {"decode_tok_s": client["output_throughput"], "seconds": round(client["duration"], 2)}
    if workload == "first-request":
        first, tenth = (1000 * client["ttfts"][i] for i in (0, 9))
        row |= {"first_ttft_ms": first, "tenth_ttft_ms": tenth, "first_over_tenth": first / tenth}
    return row | {name: value for name, value in client.items() if name.endswith("_ms")}


def serving(
    arm: Arm, engine: dict[str, Any], options: Namespace, log: Path, deadline: float
) -> contextlib.AbstractContextManager[Server]:
    """Starts a server and puts its command into ``engine``, its entry in the run's record. As a
    context it is ready."""
    server = Server(arm, engine["args"], options, log)
    engine["command"] = processes.command_line(server.command)

    @contextlib.contextmanager
    def ready() -> Iterator[Server]:
        try:
            server.wait_until_ready(deadline)
            yield server
        except OSError as error:
            raise RunError(f"the server did not answer: {error}") from None
        finally:
            processes.stop(server.process)

    return ready()


def measure(
    arm: Arm, workloads: list[str], engine: dict[str, Any], options: Namespace, deadline: float
) -> Iterator[Row]:
    log = options.out / f"{engine['arm']}-server.log"
    started = serving(arm, engine, options, log, deadline)
    client = Client(log.with_name(f"{engine['arm']}-client.log"))

    def rows() -> Iterator[Row]:
        before: list[str] = []
        try:
            with started as server:
                yield {}
                for workload in (name for name in SERVED if name in workloads):
                    for load in SERVED[workload].loads:
                        row = server.measure(client, workload, load, deadline)
                        yield row | {"server_did_before": list(before)}
                    before.append(workload)
        finally:
            processes.stop(client.process)

    return rows()
