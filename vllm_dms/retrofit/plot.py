"""Pictures of a training log and of an evaluation, where matplotlib is installed."""

import json
from pathlib import Path


def _pyplot():
    """None: matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_log(log: Path, png: Path) -> bool:
    """Loss, live ratio, and how much each head evicts, by step. False: matplotlib is not installed.
    Of an empty log there is nothing to draw."""
    plt = _pyplot()
    if plt is None:
        return False
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


def plot_evaluation(arms: dict[str, dict], png: Path) -> bool:
    """Reports of `Evaluation` by name, the one to judge first: live ratio, KL and top-1 by length,
    and the share evicted by that one's layers and heads. False: matplotlib is not installed."""
    plt = _pyplot()
    if plt is None:
        return False
    figure, (ratio, kl, top, rates) = plt.subplots(1, 4, figsize=(17, 4), layout="constrained")
    for name, arm in arms.items():
        at = {int(n): found for n, found in arm["at_length"].items()}
        for axis, key in ((ratio, "live_compression"), (kl, "kl_mean"), (top, "top1_agreement")):
            axis.plot(list(at), [found[key] for found in at.values()], "o-", label=name)
    ratio.set(xlabel="tokens", title="live compression")
    kl.set(xlabel="tokens", title="mean KL, nats")
    if len(arms) > 1:
        kl.set_yscale("symlog", linthresh=1e-3)
    top.set(xlabel="tokens", title="same most likely token")
    kl.legend()
    shown = rates.imshow(
        next(iter(arms.values()))["per_head_evicted"],
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
    )
    rates.set(xlabel="KV head", ylabel="layer", title="share evicted")
    figure.colorbar(shown, ax=rates)
    figure.savefig(png, dpi=110)
    plt.close(figure)
    return True
