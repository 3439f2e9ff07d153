"""The plot of README's results, and whether it still shows the rows."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PLOT_HASH = "vllm-dms-points"  # key in the PNG of the hash of the points it shows

Rows = Iterable[dict[str, dict[str, Any]]]  # by arm, of each line of the table


def points(rows: Rows) -> tuple[dict[str, list], dict[str, int]]:
    """By arm: (requests, decode tokens/s), the full pool last; requests held."""
    decode: dict[str, list] = {}
    held: dict[str, int] = {}
    for arm, row in (pair for by_arm in rows for pair in by_arm.items()):
        if row["workload"] in ("decode-8k", "saturated-8k"):
            decode.setdefault(arm, []).append((row["concurrency"], row["decode_tok_s"]))
        elif row["workload"] == "capacity-8k":
            held[arm] = row["requests_held"]
    return decode, held


def points_hash(rows: Rows) -> str:
    return hashlib.sha256(json.dumps(points(rows), sort_keys=True).encode()).hexdigest()


def plot(rows: Rows, arm_names: dict[str, str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained"
    )
    decode, all_held = points(rows)
    for i, (arm, name) in enumerate(arm_names.items()):
        label = name.replace("`", "")
        if arm in decode:
            line = zip(*sorted(decode[arm]), strict=True)
            left.plot(*line, marker="o", color=f"C{i}", label=label)
        if arm in all_held:
            held, label = all_held[arm], label.replace(", ", "\n")
            right.bar(label, held, color=f"C{i}")
            right.text(label, held, f"{held:,}", ha="center", va="bottom")
    left.set(xscale="log", yscale="log", xlabel="requests decoding at a context of 8K",
             ylabel="tokens/s", title="Decode throughput; last point: pool full")  # fmt: skip
    right.set(title="Requests of 8K held at once")
    right.margins(y=0.1)
    if left.has_data():
        left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=120, metadata={"Software": None, PLOT_HASH: points_hash(rows)})
    pyplot.close(figure)


def plot_is_current(rows: Rows, path: Path) -> bool:
    from PIL import Image

    if not path.exists():
        return False
    with Image.open(path) as image:
        return image.info.get(PLOT_HASH) == points_hash(rows)
