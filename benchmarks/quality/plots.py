"""Needle accuracy by depth and length for each arm, and the share that each head keeps."""

from pathlib import Path

from .task import BANDS


def draw(rows: list[dict], live_share: list[list[float]], png: Path) -> None:
    """live_share (L, H)"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(r["arm"] for r in rows))
    figure, axes = plt.subplots(
        1, len(arms) + 1, figsize=(3 * len(arms) + 3, 3.4), layout="constrained"
    )
    for axis, arm in zip(axes, arms, strict=False):
        mine = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["length"])
        grid = [
            [
                float("nan") if r["accuracy_by_depth"][b] is None else r["accuracy_by_depth"][b]
                for r in mine
            ]
            for b in range(BANDS)
        ]
        axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        _numbers(axis, grid)
        axis.set(
            title=f"{arm}\n{mine[-1]['live_compression']:.1f}x at {mine[-1]['length']}",
            xlabel="length",
            xticks=range(len(mine)),
            xticklabels=[r["length"] for r in mine],
            yticks=range(BANDS),
            yticklabels=[f"{(b + 0.5) / BANDS:.0%}" for b in range(BANDS)],
        )
    axes[0].set_ylabel("depth of the needle")
    axis = axes[-1]
    axis.imshow(live_share, vmin=0, cmap="Blues", aspect="auto")
    if len(live_share) * len(live_share[0]) <= 64:
        _numbers(axis, live_share)
    axis.set(
        title=f"share kept by dms\nat {max(r['length'] for r in rows)}",
        xlabel="KV head",
        ylabel="layer",
        xticks=range(len(live_share[0])),
        yticks=range(len(live_share)),
    )
    figure.savefig(png, dpi=120)
    plt.close(figure)


def _numbers(axis, grid: list[list[float]]) -> None:
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value == value:
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize="small")
