"""Host time of one layer's launches, by kind of batch and by part.

    python benchmarks/bench_launches.py --json launches.json [--rounds 100] [--layers 36]

Shape: Qwen3-8B's attention (8 KV heads, 4 query heads each, head_dim 128), window 512. A round is a
step of all layers: nothing waits for the GPU in it, and a queue of launches does not fill. Figures
are medians over rounds of a layer's microseconds. `layer_us` is a layer's op as a model calls it,
with the two tensors that it is given. `parts_us` is the same by its parts, timed in rounds of their
own: what they leave of it is the `op`. `launches_us` is what of them is spent in launches, by
kernel.

Without a GPU launches are replaced by nothing: figures are then of the plugin's Python alone, and
`launches` in the JSON says so.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from certificate import certificate, command_and_date
from kernel_arena import MAX_LAYERS, STORAGE
from launch_step import LaunchStep, Request

from vllm_dms.backend.kernels.launch import Launcher

KINDS = {
    "fresh prompt within the window": [Request(0, 128)],
    "fresh prompt beyond the window": [Request(0, 1024)],
    "later chunk": [Request(2048, 512)],
    "fresh prompt within the window, 31 decodes": [*[Request(256, 1)] * 31, Request(0, 128)],
    "32 decodes": [Request(256, 1)] * 32,
}


class Spans:
    """Microseconds a layer, by name: of the round, and of all rounds; the first does not count."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.round: dict[str, float] = defaultdict(float)
        self.rounds: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, work: Callable[[], object]) -> None:
        begin = time.perf_counter()
        work()
        self.round[name] += time.perf_counter() - begin

    def end_round(self) -> None:
        for name, seconds in self.round.items():
            self.rounds[name].append(1e6 * seconds / self.num_layers)
        self.round.clear()

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(all_[1:]), 2) for name, all_ in self.rounds.items()}


@contextmanager
def watched_launches(spans: Spans) -> Iterator[None]:
    """Launches are timed by kernel."""
    launch = Launcher.at

    def watched(launcher: Launcher, *args: Any) -> None:
        name = launcher._kernel.__name__.removesuffix("_kernel")
        spans.add(name, lambda: launch(launcher, *args))

    Launcher.at = watched
    try:
        yield
    finally:
        Launcher.at = launch


def time_step(step: LaunchStep, rounds: int) -> dict[str, Any]:
    """Medians over ``rounds``, after one that does not count."""
    whole, parts, launches = (Spans(step.num_layers) for _ in range(3))

    def run(spans: Spans, work: Callable[[], None]) -> None:
        for _ in range(rounds + 1):
            step.restore()
            if step.device.type == "cuda":
                torch.cuda.synchronize(step.device)
            work()
            spans.end_round()

    with step.served() as run_layers:
        run(whole, lambda: whole.add("layer", run_layers))
        with step.watched(parts.add):
            run(parts, run_layers)
        with watched_launches(launches):
            run(launches, run_layers)
    layer, by_part = whole.medians()["layer"], parts.medians()
    by_part["op"] = round(layer - sum(by_part.values()), 2)
    return {"layer_us": layer, "parts_us": by_part, "launches_us": launches.medians()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="steps that are timed")
    parser.add_argument("--layers", type=int, default=MAX_LAYERS)
    parser.add_argument("--storage", choices=STORAGE, default="bf16")
    parser.add_argument("--json", type=Path, required=True, help="where results go")
    parser.add_argument("--commit", help="where there is no .git to ask")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        import launch_stub

        launch_stub.install()
    report = {**command_and_date(), **certificate(args.commit), "rows": []}
    report |= {"launches": "real" if device.type == "cuda" else "none: the plugin's Python alone"}
    report |= {"storage": args.storage, "layers": args.layers, "rounds": args.rounds}
    for name, requests in KINDS.items():
        step = LaunchStep(requests, args.layers, args.storage, device)
        row = {"batch": name, **time_step(step, args.rounds)}
        report["rows"].append(row)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
