"""README.md of an adapter's directory."""

from pathlib import Path

from .recipe import Recipe


def card(
    base: str,
    recipe: Recipe,
    data: list[str],
    steps: int,
    result: dict,
    init: Path | None = None,
    live: float | None = None,
) -> str:
    names = ", ".join(Path(name).name if Path(name).is_file() else name for name in data)
    tokens = steps * recipe.batch * recipe.length
    trained = (
        f"Trained by `python -m vllm_dms.retrofit` on {names}: {steps} steps of {recipe.batch} "
        f"rows of {recipe.length} tokens ({tokens / 1e6:.1f} M), ratio {recipe.ratio:g}, learning "
        f"rate {recipe.lr:g}, seed {recipe.seed}"
    )
    if init:
        trained = f"{trained}, from" if steps else "These are"
        trained += f" the decisions of {init.name}"
    if live:
        trained += (
            f". The threshold was moved to a live ratio of {live:g} at {recipe.length} tokens on "
            f"rows of {names}"
        )
    lines = [
        f"# DMS adapter for {base}",
        "",
        "Decides, per layer and KV head, which tokens the KV cache may forget once they leave a "
        f"window of {recipe.window} tokens. The base model's own weights are untouched.",
        "",
        f"{trained}.",
        "",
        f"On {result['rows']} rows that were not trained on, against the base model:",
        "",
        "| tokens | live compression | mean KL, nats | same most likely token |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for length, at in result["at_length"].items():
        lines.append(
            f"| {length} | {at['live_compression']:.2f} | {at['kl_mean']:.4f} | "
            f"{at['top1_agreement']:.2%} |"
        )
    lines += [
        "",
        f"Largest KL {result['kl_max']:.2f}. `evaluation.png` has what each layer and head evicts.",
    ]
    return "\n".join(lines) + "\n"
