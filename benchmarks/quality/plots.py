"""Needle accuracy by depth and length for each arm."""

from pathlib import Path

from .task import BANDS


def draw(rows: list[dict], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(r["arm"] for r in rows))
    size = (3 * len(arms), 3.4)
    figure, axes = plt.subplots(1, len(arms), figsize=size, layout="constrained")
    for axis, arm in zip(axes, arms, strict=True):
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["length"])
        depths = [[float("nan") if x is None else x for x in r["accuracy_by_depth"]] for r in mine]
        grid = list(zip(*depths, strict=True))
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if value == value:
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize="small")
        title = f"{arm}\n{mine[-1]['live_compression']:.1f}x at {mine[-1]['length']}"
        axis.set(title=title, xlabel="length", xticks=range(len(mine)), yticks=range(BANDS))
        axis.set_xticklabels([r["length"] for r in mine])
        axis.set_yticklabels([f"{(b + 0.5) / BANDS:.0%}" for b in range(BANDS)])
    axes[0].set_ylabel("depth of the needle")
    figure.savefig(png, dpi=120)
    plt.close(figure)
