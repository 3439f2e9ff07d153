"""What surrounds a number: where it was measured, with what, and how runs become one summary."""

import argparse
import json
import os
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def _output_of(*command: str, cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def git_commit(path: Path) -> str | None:
    """Of the plugin and of the benchmarks; their results may differ."""
    commit = _output_of("git", "rev-parse", "--short=10", "HEAD", cwd=path)
    code = ("../vllm_dms", ".", ":!results")
    changed = _output_of("git", "status", "--porcelain", "--", *code, cwd=path)
    return f"{commit}+changes" if commit and changed else commit


def _ask_gpu(query: str) -> str | None:
    """Of the first GPU that this process may use: the one that the benchmarks use."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    answer = _output_of(*command, *(["-i", first] if first else []))
    return answer.splitlines()[0] if answer else None


def gpu_facts() -> dict[str, str | None]:
    found = _ask_gpu("name,uuid,driver_version")
    values = found.split(", ") if found else ["none (CPU)", None, None]
    return dict(zip(("gpu", "gpu_uuid", "driver"), values, strict=True))


def gpu_name() -> str:
    return gpu_facts()["gpu"] or ""


def gpu_memory() -> dict[str, int]:
    used = _ask_gpu("memory.used")
    return {"gpu_memory_mib": int(used)} if used else {}


def version_of(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def model_facts(model: Path) -> dict[str, Any]:
    """Of a directory made by synthetic.py, or of any DMS checkpoint."""
    made = model / "dms" / "synthetic.json"
    if made.exists():
        return json.loads(made.read_text())
    config = json.loads((model / "config.json").read_text())
    names = {"layers": "num_hidden_layers", "window": "dms_window_size"}
    return {"shape": model.resolve().name} | {k: config.get(v) for k, v in names.items()}


def facts_of_engine(config: Any) -> dict[str, Any]:
    """Of a started engine's VllmConfig."""
    cache, scheduler, compilation = (
        config.cache_config,
        config.scheduler_config,
        config.compilation_config,
    )
    sizes = compilation.cudagraph_capture_sizes or []
    return {
        "pool_bytes": cache.kv_cache_memory_bytes,
        "num_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "pool_tokens": cache.num_gpu_blocks * cache.block_size,
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "async_scheduling": scheduler.async_scheduling,
        "prefix_caching": cache.enable_prefix_caching,
        "compilation": compilation.mode.name,
        "cudagraphs": compilation.cudagraph_mode.name,
        "largest_graph": max(sizes, default=0),
        **gpu_memory(),
    }


def facts_of_log(log: str) -> dict[str, Any]:
    """What only the log tells."""
    versions = set(re.findall(r"Using FlashAttention version (\d)", log))
    backends = set(re.findall(r"Using (\w+) attention backend", log))
    # Of layers that DMS replaces, vLLM names the backend that they would have had.
    if kernels := set(re.findall(r"DMS attention: (\w+) kernels", log)):
        backends, versions = kernels, set()

    def those_with(text: str) -> list[str]:
        return [line.split("] ", 1)[-1] for line in log.splitlines() if text in line]

    return {
        "attention": ", ".join(sorted(backends)) + "".join(f" (FA{v})" for v in sorted(versions)),
        "banner": those_with("DMS cache:")[:1],
        "compression": those_with("live compression")[-1:],
    }


def first_error(log: Path) -> str:
    """The exception that came first: later ones say that a process is gone."""
    found = re.search(r"\w+Error: .+", log.read_text(errors="replace"))
    return found.group()[:400] if found else f"see {log.name}"


# Workloads whose concurrency is a result.
UNTIL_FULL = ("saturated-8k", "capacity-8k")
Load = tuple[str, int | None, str, int | None]


def load_of(row: Row) -> Load:
    """Workload; concurrency where it is set; of the server's: requests per second, and in all."""
    workload = row["workload"]
    concurrency = None if workload in UNTIL_FULL else row["concurrency"]
    return workload, concurrency, str(row.get("request_rate") or "inf"), row.get("completed")


# Arms whose rows are compared with one another: those of one run, side by side.
COMPARED = (("bf16", "dms_noevict", "dms"), ("fp8", "dms_fp8"))


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Rows of both, ``new`` those of whole runs; of a load, a row goes when a run of later id has
    its arm and all arms that it was compared with. So arms measured side by side stay together."""
    new = list(new)
    rows = [r for r in old if r["run_id"] not in {n["run_id"] for n in new}] + new
    measured = _arms(rows)

    def replaced(row: Row) -> bool:
        load = load_of(row)
        beside = {arm for group in COMPARED if row["arm"] in group for arm in group}
        arms = measured[row["run_id"], load] & beside
        return any(
            of == load and run_id > row["run_id"] and arms <= found
            for (run_id, of), found in measured.items()
        )

    kept = [row for row in rows if not replaced(row)]
    return sorted(kept, key=lambda r: (r["workload"], r["run_id"], r["concurrency"]))


def _arms(rows: Iterable[Row]) -> dict[tuple[str, Load], set[str]]:
    arms: dict[tuple[str, Load], set[str]] = {}
    for row in rows:
        arms.setdefault((row["run_id"], load_of(row)), set()).add(row["arm"])
    return arms


def update_summary(path: Path, rows: list[Row]) -> None:
    write_json(path, merge(json.loads(path.read_text()) if path.exists() else [], rows))


def write_json(path: Path, content: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def main() -> None:
    """Copy runs that were measured elsewhere beside the summary, and merge them into it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="RUN_ID.json")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    for path in args.runs:
        report = json.loads(path.read_text())
        write_json(args.results / path.name, report)
        update_summary(args.results / "summary.json", report["rows"])


if __name__ == "__main__":
    main()
