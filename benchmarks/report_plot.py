"""The plot of README's results, and whether it still shows the rows."""

import hashlib
import json
from pathlib import Path
from typing import Any

from serving_results import Load, load_of

PLOT_HASH = "vllm-dms-rows"  # key in the PNG of the hash of the rows it shows

Row = dict[str, Any]


def rows_hash(rows: list[Row]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def plot(rows: list[Row], arm_names: dict[str, str], path: Path) -> None:
    """Decode throughput against concurrency, the full pool as its last point; requests held."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained"
    )
    for i, (arm, name) in enumerate(arm_names.items()):
        label = name.replace("`", "")
        points = sorted(
            (row["concurrency"], row["decode_tok_s"])
            for row in newest(rows, arm, ("decode-8k", "saturated-8k"))
            if row["decode_tok_s"] is not None
        )
        if points:
            left.plot(*zip(*points, strict=True), marker="o", color=f"C{i}", label=label)
        for row in newest(rows, arm, ("capacity-8k",)):
            held = row["requests_held"] or 0
            right.bar(label.replace(", ", "\n"), held, color=f"C{i}")
            right.text(label.replace(", ", "\n"), held, f"{held:,}", ha="center", va="bottom")
    left.set(xscale="log", yscale="log", xlabel="requests decoding at a context of 8K",
             ylabel="tokens/s", title="Decode throughput; last point: pool full")  # fmt: skip
    right.set(title="Requests of 8K held at once")
    right.margins(y=0.1)
    if left.has_data():
        left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure_.savefig(path, dpi=120, metadata={"Software": None, PLOT_HASH: rows_hash(rows)})
    pyplot.close(figure_)


def newest(rows: list[Row], arm: str, workloads: tuple[str, ...]) -> list[Row]:
    """The arm's rows of the workloads, each load from the newest run that has it."""
    mine = [row for row in rows if row["arm"] == arm and row["workload"] in workloads]
    last: dict[Load, str] = {}
    for row in mine:
        last[load_of(row)] = max(last.get(load_of(row), ""), row["run_id"])
    return [row for row in mine if row["run_id"] == last[load_of(row)]]


def plot_is_current(rows: list[Row], path: Path) -> bool:
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get(PLOT_HASH) == rows_hash(rows)
