"""The training log as one picture: loss, live ratio, and how much each head evicts."""

import json
from pathlib import Path


def plot_log(log: Path, png: Path) -> bool:
    """False: matplotlib is not installed. Of an empty log there is nothing to draw."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in log.read_text().splitlines()]
    if not records:
        return True
    steps = [r["step"] for r in records]
    figure, (loss, ratio, heads) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    loss.plot(steps, [r["kl"] for r in records], label="KL to the teacher")
    loss.plot(steps, [r["penalty"] for r in records], label="penalty")
    loss.set(yscale="symlog", xlabel="step", title="loss")
    loss.set_yscale("symlog", linthresh=1e-3)
    loss.legend()
    ratio.plot(steps, [r["target_ratio"] for r in records], "--", label="target")
    ratio.plot(steps, [r["live_compression"] for r in records], label="live, window included")
    ratio.set(xlabel="step", title="compression")
    ratio.legend()
    for layer in range(len(records[0]["per_head_evicted"])):
        for head in range(len(records[0]["per_head_evicted"][layer])):
            heads.plot(
                steps,
                [r["per_head_evicted"][layer][head] for r in records],
                label=f"{layer}.{head}",
                lw=1,
            )
    heads.set(xlabel="step", title="share evicted by layer.head", ylim=(0, 1))
    if sum(len(layer) for layer in records[0]["per_head_evicted"]) <= 16:
        heads.legend(ncols=2, fontsize="small")
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return True
