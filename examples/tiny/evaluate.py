"""Needle accuracy of a DMS checkpoint in plain PyTorch, beside eviction off and two controls of
the same memory.

python -m examples.tiny.evaluate MODEL [--length 4096] [--documents 64] [--out FILE.json]
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from vllm_dms.config import DMSConfig
from vllm_dms.retrofit.checkpoint import load_dms
from vllm_dms.retrofit.controls import RandomEviction, window_only
from vllm_dms.retrofit.determinism import deterministic
from vllm_dms.retrofit.forward import forward
from vllm_dms.retrofit.gates import Gate, hard, keep_all
from vllm_dms.retrofit.losses import live_tokens

from . import needles

DEPTHS = 4  # bands of depth in the report


class Tally:
    """What one arm did over all documents."""

    def __init__(self):
        self.hits = torch.zeros(DEPTHS)
        self.asked = torch.zeros(DEPTHS)
        self.kl: list[torch.Tensor] = []
        self.same: list[torch.Tensor] = []
        self.evict: list[torch.Tensor] = []  # (L, H) a document
        self.live: list[torch.Tensor] = []  # (L, H) live share a document

    def report(self) -> dict:
        kl, live = torch.cat(self.kl), torch.stack(self.live)
        return {
            "needle_accuracy": (self.hits.sum() / self.asked.sum()).item(),
            "accuracy_by_depth": [
                round(x, 4) for x in (self.hits / self.asked.clamp_min(1)).tolist()
            ],
            "kl_mean": kl.mean().item(),
            "kl_max": kl.max().item(),
            "top1_agreement": torch.cat(self.same).float().mean().item(),
            "live_compression": 1 / live.mean().item(),
            "live_share_per_head": [
                [round(x, 4) for x in layer] for layer in live.mean(0).tolist()
            ],
        }


class Evaluation:
    """Runs arms over the same held-out documents."""

    def __init__(self, model, dms: DMSConfig, seed: int, length: int, documents: int):
        self.model, self.dms, self.length = model, dms, length
        self.documents = list(needles.held_out_documents(seed, length, documents))

    @torch.no_grad()
    def arm(self, dms: DMSConfig, gate: Gate) -> Tally:
        tally = Tally()
        for row, spots in self.documents:
            ids = torch.tensor([row], device=self.model.device)
            truth = self.model.lm_head(forward(self.model, ids, self.dms, keep_all).hidden)[
                0
            ].float()
            output = forward(self.model, ids, dms, gate)
            logits = self.model.lm_head(output.hidden)[0].float()
            best = logits.argmax(-1)
            for first, depth in spots:
                span = slice(first, first + needles.CODE_TOKENS)
                band = min(int(depth * DEPTHS), DEPTHS - 1)
                tally.hits[band] += bool((best[first - 1 : span.stop - 1] == ids[0, span]).all())
                tally.asked[band] += 1
            # Before the window is full nothing has been evicted.
            truth, logits = (x[self.dms.window + 1 :].log_softmax(-1) for x in (truth, logits))
            tally.kl.append((truth.exp() * (truth - logits)).sum(-1).cpu())
            tally.same.append((truth.argmax(-1) == logits.argmax(-1)).cpu())
            evict = output.evict[:, 0].float()
            tally.evict.append(evict.mean(-1).cpu())
            live = len(row) if gate is keep_all else live_tokens(evict, dms.window, dms.shift)
            tally.live.append(
                (live / torch.full(evict.shape[:2], len(row), device=evict.device)).cpu()
            )
        return tally

    def run(self) -> dict:
        served = self.arm(self.dms, hard)
        rates = torch.stack(served.evict).mean(0)
        # The window that holds as many tokens as DMS keeps, window and survivors together.
        budget = round(torch.stack(served.live).mean().item() * self.length)
        arms = {
            "eviction off": self.arm(self.dms, keep_all),
            "dms": served,
            "random eviction": self.arm(self.dms, RandomEviction(rates, seed=1)),
            "window only": self.arm(replace(self.dms, window=max(budget - 1, 1)), window_only),
        }
        return {name: tally.report() for name, tally in arms.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=64, help="of up to 16 needles each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, dms = load_dms(args.model, getattr(torch, args.dtype))
    with deterministic():
        report = Evaluation(model.to(device), dms, args.seed, args.length, args.documents).run()
    for name, arm in report.items():
        print(
            f"{name:16} accuracy {arm['needle_accuracy']:.4f} by depth {arm['accuracy_by_depth']} "
            f"KL {arm['kl_mean']:.4f} live compression {arm['live_compression']:.2f}"
        )
    if args.out:
        result = {
            "model": str(args.model),
            "length": args.length,
            "documents": args.documents,
            "seed": args.seed,
            "dtype": args.dtype,
            "arms": report,
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
