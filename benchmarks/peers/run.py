"""Other implementations on the load of the comparison that NVIDIA's DMS was published with: 64
prompts of up to 1,024 tokens at once, in transformers (2,687 tok/s on an H100).

    python benchmarks/synthetic.py Qwen3-8B --out /tmp/qwen3-8b
    python benchmarks/peers/run.py --model /tmp/qwen3-8b --out peers.json

Each peer is a process of its own, which needs its package: `pip install --no-deps fastdms==0.2.0
xxhash` or `pip install kvpress==0.5.5`. One that does not run gets a row that says why. The plugin
and stock vLLM on the same load: bench_serving.py --workloads batch-1k.
"""

import argparse
import json
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import processes  # noqa: E402
from arms import ARMS  # noqa: E402
from certificate import certificate, command_and_date  # noqa: E402

PEERS = ("fastdms_compact", "kvpress_knorm", "nvidia_hub")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory made by synthetic.py")
    add("--out", type=Path, required=True, help="JSON; rows of other peers in it stay")
    add("--peers", type=lambda text: text.split(","), default=[*PEERS])
    add("--batch", type=int, default=64)
    add("--prompt", type=int, default=1024)
    add("--tokens", type=int, default=256, help="generated for each prompt")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, default=240, help="for each peer")
    add("--commit", help="where there is no .git to ask")
    return parser.parse_args(argv)


def row_of(peer: str, args: argparse.Namespace) -> dict:
    log, to = (args.out.with_name(f"{peer}{end}") for end in (".log", ".row.json"))
    to.unlink(missing_ok=True)
    load = {name: getattr(args, name) for name in ("batch", "prompt", "tokens", "seed")}
    own = {"model": str(args.model), "to": str(to), "until": time.time() + args.seconds}
    spec = json.dumps(own | load)
    command = [sys.executable, str(HERE / f"{peer}.py"), spec]
    try:
        processes.run(ARMS["bf16"], command, log, time.monotonic() + args.seconds)
        found = json.loads(to.read_text())
    except processes.RunError as error:
        found = {"error": str(error)}
        if stack := stack_of(log):
            found = {"error": f"no result in {args.seconds:.0f} s", "stack": stack}
    model = json.loads((args.model / "dms" / "synthetic.json").read_text())
    shape = {"model": model["shape"], "layers": model["layers"], "dms_window": model["window"]}
    return {"peer": peer, **load, **shape, **found}


def stack_of(log: Path) -> list[str]:
    """Where the main thread was when the peer's time ran out (`load.run`), innermost call first."""
    text = log.read_text(errors="replace") if log.exists() else ""
    _, timeout, threads = text.rpartition("Timeout (")
    main_thread = threads.rpartition("(most recent call first)")[2]
    calls = re.findall(r'File "(.+)", line (\d+) in (.+)', main_thread) if timeout else []
    return [f"{'/'.join(Path(file).parts[-2:])}:{line} {name}" for file, line, name in calls]


def main() -> None:
    args = parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    stamp = certificate(args.commit) | command_and_date()
    kept = json.loads(args.out.read_text()) if args.out.exists() else []
    rows = [row for row in kept if row["peer"] not in args.peers]
    for peer in args.peers:
        rows.append(row_of(peer, args) | stamp)
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
        told = f"{rows[-1]['tok_s']:,.0f} tok/s" if "tok_s" in rows[-1] else rows[-1]["error"]
        print(f"{peer}: {told}", flush=True)


if __name__ == "__main__":
    processes.end_on_signals()
    main()
