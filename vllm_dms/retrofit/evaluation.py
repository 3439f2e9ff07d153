"""What a retrofit does on rows that it was not trained on, beside two controls of the same memory.

python -m vllm_dms.retrofit.evaluation MODEL --data FILE [--base DIR] [--controls]
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from vllm_dms.adapter_paths import weights_dir
from vllm_dms.config import DMSConfig

from . import checkpoint, data
from .controls import RandomEviction, window_only
from .determinism import deterministic
from .forward import forward
from .gates import Gate, hard, keep_all
from .losses import TOKEN_CHUNK, live_compression, live_tokens
from .plot import plot_evaluation

# ids (B, T) -> hidden states (B, T, hidden)
Teacher = Callable[[torch.Tensor], torch.Tensor]


def compare(
    student: torch.Tensor, teacher: torch.Tensor, student_head: nn.Module, teacher_head: nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (T, hidden) -> KL(teacher || student) (T), same most likely token (T)"""
    kls, same = [], []
    for s, t in zip(student.split(TOKEN_CHUNK), teacher.split(TOKEN_CHUNK), strict=True):
        guess, truth = (
            h(x).float().log_softmax(-1) for h, x in ((student_head, s), (teacher_head, t))
        )
        kls.append((truth.exp() * (truth - guess)).sum(-1))
        same.append(guess.argmax(-1) == truth.argmax(-1))
    return torch.cat(kls), torch.cat(same)


def lengths(tokens: int, first: int) -> list[int]:
    """At which lengths of a row the report looks: a quarter, a half, all of it."""
    return [n for n in (tokens // 4, tokens // 2, tokens) if n > first]


class Measured(NamedTuple):
    """Of rows (N, T), on the CPU."""

    kl: torch.Tensor  # (N, T)
    same: torch.Tensor  # (N, T) bool: the same most likely token
    evict: torch.Tensor  # (L, N, H, T) bool: decisions, at the token that decides
    window: int


class Evaluation:
    """Runs arms over the same rows (N, T)."""

    def __init__(
        self,
        model: nn.Module,
        dms: DMSConfig,
        rows: torch.Tensor,
        teacher: Teacher | None = None,
        teacher_head: nn.Module | None = None,
        autocast: bool = False,
    ):
        """teacher: the dense model's; without one, the model's own with eviction off."""
        self.model, self.dms, self.rows = model, dms, rows
        off = None if dms.adapter else dms
        self.teacher = teacher or (lambda ids: forward(model, ids, off, keep_all).hidden)
        self.teacher_head = teacher_head or model.lm_head
        self.autocast = autocast

    @torch.no_grad()
    def arm(self, gate: Gate = hard, dms: DMSConfig | None = None) -> Measured:
        dms = dms or self.dms
        kls, same, evicts = [], [], []
        device = self.model.device
        for ids in self.rows.long().to(device).split(1):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                output = forward(self.model, ids, dms, gate)
                heads = self.model.lm_head, self.teacher_head
                kl, equal = compare(output.hidden[0], self.teacher(ids)[0], *heads)
            kls.append(kl.cpu())
            same.append(equal.cpu())
            evicts.append(output.evict.bool().cpu())
        return Measured(torch.stack(kls), torch.stack(same), torch.cat(evicts, 1), dms.window)

    def report(self, found: Measured) -> dict:
        """Positions that see everything by construction, those of the model's own window, are left
        out of means."""
        kl, same, evict, window = found
        first, shift = self.dms.window + 1, self.dms.shift
        return {
            "rows": len(kl),
            "length": kl.shape[1],
            "kl_mean": kl[:, first:].mean().item(),
            "kl_max": kl.max().item(),
            "top1_agreement": same[:, first:].float().mean().item(),
            "live_compression": live_compression(evict, window, shift),
            "at_length": {
                n: {
                    "live_compression": live_compression(evict[..., :n], window, shift),
                    "kl_mean": kl[:, first:n].mean().item(),
                    "top1_agreement": same[:, first:n].float().mean().item(),
                }
                for n in lengths(kl.shape[1], first)
            },
            "per_head_evicted": [
                [round(r, 4) for r in layer] for layer in evict.float().mean((1, 3)).tolist()
            ],
        }

    def served(self) -> dict:
        """The decisions as they are served."""
        return self.report(self.arm())

    def with_controls(self) -> dict[str, dict]:
        """served; as many tokens of each head evicted at random; a window of the same memory."""
        served = self.arm()
        evict = served.evict.float()
        live = live_tokens(evict, self.dms.window, self.dms.shift).mean().item()
        arms = {
            "dms": served,
            "random eviction": self.arm(RandomEviction(evict.mean((1, 3)), seed=1)),
            "window only": self.arm(window_only, replace(self.dms, window=max(round(live) - 1, 1))),
        }
        return {name: self.report(found) for name, found in arms.items()}


def arm_line(name: str, arm: dict) -> str:
    by_length = ", ".join(
        f"{n}: {at['live_compression']:.2f}x {at['kl_mean']:.4f}"
        for n, at in arm["at_length"].items()
    )
    return (
        f"{name:16} live {arm['live_compression']:.2f}x at {arm['length']} tokens, KL mean "
        f"{arm['kl_mean']:.4f}, max {arm['kl_max']:.2f}, same top token "
        f"{arm['top1_agreement']:.2%} (by length {by_length})"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_dms.retrofit.evaluation", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="adapter or whole checkpoint")
    parser.add_argument("--base", type=Path, help="of an adapter (default: the one it names)")
    parser.add_argument("--data", required=True, help="as of the retrofit")
    parser.add_argument("--length", type=int, default=8192, help="tokens a row (default 8192)")
    parser.add_argument("--rows", type=int, help="at most so many (default: all)")
    parser.add_argument("--controls", action="store_true", help="also the controls: twice the time")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the weights (default: bfloat16 on a GPU, float32 on a CPU, where it is faster)",
    )
    parser.add_argument("--out", type=Path, help="JSON; a plot beside it")
    return parser


def main(argv: list[str] | None = None) -> None:
    from transformers import AutoTokenizer

    parser = build_parser()
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    try:
        if args.out and not args.out.parent.is_dir():
            raise ValueError(f"--out {args.out}: there is no directory {args.out.parent}.")
        data.check_source(args.data)
        model, dms = checkpoint.load_dms(args.model, getattr(torch, dtype), args.base)
        tokenizer = AutoTokenizer.from_pretrained(weights_dir(args.model, args.base))
        rows = data.load_rows(args.data, tokenizer, args.length, args.rows or 64)[: args.rows]
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    with deterministic():
        evaluation = Evaluation(model.to(device), dms, rows)
        arms = evaluation.with_controls() if args.controls else {"dms": evaluation.served()}
    for name, arm in arms.items():
        print(arm_line(name, arm))
    if args.out:
        result = {"dtype": dtype, "torch": torch.__version__, "arms": arms}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        plot_evaluation(arms, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
