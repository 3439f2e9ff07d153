"""python -m vllm_dms.verify MODEL: the rule a checkpoint evicts by, what it saves, what it costs.

Runs the plain PyTorch reference twice over one long text, with eviction on and off, so neither a
server nor vLLM is needed. Exit code 1: nothing is evicted, or the text is predicted differently.
Limits: memory grows with the square of --length (about 4 GB for 32 heads at 4,096 tokens).
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vllm_dms.adapter_paths import weights_dir
from vllm_dms.config import DMSConfig
from vllm_dms.reference import ReferenceModel, live_counts
from vllm_dms.retrofit.data import read_texts

SAMPLE = "sample.txt"  # a checkpoint that knows only texts of its own kind carries one
ROWS = 512  # tokens whose log-probabilities are compared at a time
RULES = {
    "nvidia-borrowed": "NVIDIA, decisions in a borrowed query channel",
    "nvidia-adapter": "NVIDIA, decisions from adapter weights",
    "fastdms": "FastDMS, decisions in a borrowed query channel",
}


@dataclass(frozen=True)
class Report:
    dms: DMSConfig
    num_tokens: int
    live: torch.Tensor  # (L, H) tokens that a compact cache holds at the end of the text
    kl: torch.Tensor  # nats, for each position that some key is hidden from
    top1: torch.Tensor  # bool, likewise: both give the same token the highest probability

    @property
    def compression(self) -> float:
        return self.num_tokens / self.live.float().mean().item()


def first_affected(evict: torch.Tensor, window: int) -> int:
    """e (L, H, T) -> the first position whose query can't see everything; T: there is none."""
    num_tokens = evict.shape[-1]
    positions = evict.flatten(0, 1).any(0).nonzero()
    return min(num_tokens, positions[0].item() + window + 1) if len(positions) else num_tokens


def compare(on: torch.Tensor, off: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, vocab) -> KL(off || on) (T) in nats, same most likely token (T)"""
    kls, same = [], []
    for a, b in zip(on.split(ROWS), off.split(ROWS), strict=True):
        guess, truth = a.log_softmax(-1), b.log_softmax(-1)
        kls.append((truth.exp() * (truth - guess)).sum(-1).cpu())
        same.append((guess.argmax(-1) == truth.argmax(-1)).cpu())
    return torch.cat(kls), torch.cat(same)


def measure(
    path: Path,
    token_ids: Sequence[int],
    overrides: dict | None = None,
    base: Path | None = None,
    **kwargs,
) -> Report:
    """base: of an adapter (default: the one it names); kwargs: dtype and device."""
    whole = weights_dir(path, base)
    adapter = None if whole == path else path
    model = ReferenceModel.from_dir(whole, overrides, adapter, **kwargs)
    if model.dms is None:
        raise ValueError(f"{path} is not a DMS checkpoint: its config has no eviction rule.")
    rule, num_tokens = model.dms, len(token_ids)
    on = model.forward(token_ids)
    start = first_affected(on.evict, rule.window)
    live = live_counts(on.evict, rule.window).cpu()
    if start == num_tokens:
        return Report(rule, num_tokens, live, torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    model.dms = replace(rule, evict=False)
    kl, top1 = compare(on.logits[start:], model.forward(token_ids).logits[start:])
    return Report(rule, num_tokens, live, kl, top1)


def default_text(path: Path) -> str:
    """The checkpoint's own sample, or this package's source code: long, and always there."""
    if (path / SAMPLE).is_file():
        return (path / SAMPLE).read_text()
    return "\n".join(p.read_text() for p in sorted(Path(__file__).parent.rglob("*.py")))


def read_text(path: Path, tokenizer) -> str:
    """The documents of a file, one after the other."""
    return "\n\n".join(read_texts(path, tokenizer))


def print_report(report: Report) -> None:
    dms = report.dms
    zeroed = {"both": "before and after RoPE", "before": "before RoPE only", "never": "not at all"}
    ratio = f"{dms.nominal_ratio:g}x" if dms.nominal_ratio else "not stated"
    decided = "the next token" if dms.shift else "the token itself"
    print(f"dialect   {dms.dialect}: {RULES[dms.dialect]}, per {dms.alpha_per}")
    print(f"window    {dms.window}")
    print(f"shift     {dms.shift}: a token's fate is decided by {decided}")
    if not dms.adapter:
        print(f"zero      {dms.zero}: the borrowed channel is zeroed {zeroed[dms.zero]}")
    print(f"ratio     {ratio} (trained for)")
    print(f"live compression over {report.num_tokens} tokens, window included, by layer and head:")
    for layer, live in enumerate(report.live):
        rates = " ".join(f"{report.num_tokens / x:6.2f}" for x in live.tolist())
        print(f"  layer {layer:2}  {report.num_tokens / live.float().mean():6.2f}x   {rates}")
    print(f"  all       {report.compression:6.2f}x")
    if len(report.kl):
        print(
            f"KL to eviction off at {len(report.kl)} positions with something evicted: "
            f"mean {report.kl.mean():.5f}, max {report.kl.max():.4f} nats; "
            f"same top token {report.top1.float().mean():.2%}"
        )


def verdict(report: Report, max_kl: float) -> str | None:
    """What is wrong, or None."""
    if not len(report.kl):
        return f"nothing is evicted within {report.num_tokens} tokens"
    mean = report.kl.mean().item()
    # Not >: a NaN must fail.
    if not mean <= max_kl:
        return f"mean KL {mean:.4f} is above --max-kl {max_kl:g}: eviction changes the answers"
    return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-dms verify",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Which rule a DMS checkpoint evicts by, what it saves and what that costs.",
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="directory of a checkpoint or of an adapter"
    )
    parser.add_argument("--base", type=Path, help="of an adapter (default: the one it names)")
    parser.add_argument(
        "--text",
        type=Path,
        help="text to read, plain or as records as the retrofit reads them "
        f"(default: MODEL/{SAMPLE} or code)",
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens of it")
    parser.add_argument("--max-kl", type=float, default=0.1, help="bound of the mean KL, in nats")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    return parser


def main(argv: list[str] | None = None) -> int:
    from transformers import AutoTokenizer

    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.model / "config.json").is_file():
        parser.error(f"{args.model} has no config.json: MODEL must be a checkpoint's directory.")
    if args.text and not args.text.is_file():
        parser.error(f"--text {args.text}: there is no such file.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(weights_dir(args.model, args.base))
        text = read_text(args.text, tokenizer) if args.text else default_text(args.model)
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[: args.length]
        dtype = getattr(torch, args.dtype)
        report = measure(args.model, ids, base=args.base, dtype=dtype, device=device)
    except ValueError as error:
        parser.error(str(error))
    print_report(report)
    problem = verdict(report, args.max_kl)
    print(f"FAILED: {problem}" if problem else "OK")
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
