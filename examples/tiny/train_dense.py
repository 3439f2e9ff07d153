"""Trains the dense tiny model: next-token loss, context grown in stages.

python -m examples.tiny.train_dense --out DIR [--preset tiny|smoke|test]
    [--max-minutes M] [--resume]
"""

import argparse
import json
import os
import time
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vllm_dms.retrofit.determinism import deterministic

from . import needles
from .model import PRESETS, Preset, Stage, build_model
from .tokenizer import build_tokenizer

# Weight in the loss, by label: filler, digits nobody can know, digits to be recalled.
LABEL_WEIGHTS = (0.5, 0.0, 4.0)
WARMUP_STEPS = 50
COOL_DOWN = 0.4  # last share of the run, in which the learning rate falls to zero


class Batches(Dataset):
    """Item i is the batch of step first_step + i, a pure function of (seed, step): any workers,
    any resume point."""

    def __init__(self, seed: int, stages: tuple[Stage, ...], first_step: int):
        self.seed, self.first_step = seed, first_step
        self.plan = [s for s in stages for _ in range(s.steps)]

    def __len__(self) -> int:
        return len(self.plan) - self.first_step

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, labels: int32, uint8 [batch, length]."""
        step = self.first_step + i
        stage = self.plan[step]
        rows = [
            needles.training_example(
                Random(f"train:{self.seed}:{step}:{b}"), stage.length, stage.drills
            )
            for b in range(stage.batch)
        ]
        ids, labels = zip(*rows, strict=True)
        return torch.tensor(ids, dtype=torch.int32), torch.tensor(labels, dtype=torch.uint8)


def make_optimizers(model: nn.Module, preset: Preset) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding and norms; each remembers its base
    rate."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=preset.muon_lr, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=preset.lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def lr_factor(progress: float, step: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS, max(0.0, 1 - progress) / COOL_DOWN)


def loss_fn(
    model: nn.Module, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, labels (B, T) -> weighted mean loss; mean loss of recalled digits alone (detached)."""
    logits = model(ids, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    kinds = labels[:, 1:].flatten().long()
    weights = torch.tensor(LABEL_WEIGHTS, device=ids.device)[kinds]
    recall = (kinds == needles.RECALL).float()
    recall_loss = (each.detach() * recall).sum() / recall.sum().clamp_min(1)
    return (each * weights).sum() / weights.sum(), recall_loss


@torch.no_grad()
def recall_accuracy(model: nn.Module, seed: int, length: int, num_documents: int) -> float:
    """Share of held-out facts whose every token is the argmax: teacher-forced, so the same as
    greedy decoding."""
    device = next(model.parameters()).device
    hits = total = 0
    for row, spots in needles.held_out_documents(seed, length, num_documents):
        ids = torch.tensor([row], device=device)
        best = model(ids, use_cache=False).logits[0].argmax(-1)
        for first, _ in spots:
            span = slice(first, first + needles.CODE_TOKENS)
            hits += bool((best[first - 1 : span.stop - 1] == ids[0, span]).all())
            total += 1
    return hits / total


class DenseTrainer:
    """Model, optimizers and their state on disk."""

    def __init__(self, preset: Preset, seed: int, out: Path):
        self.preset, self.seed, self.out = preset, seed, out
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = build_model(preset, seed).to(self.device)
        self.optimizers = make_optimizers(self.model, preset)
        self.step, self.seconds = 0, 0.0
        (out / "training").mkdir(parents=True, exist_ok=True)
        self.state_file = out / "training" / "state.pt"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def save_state(self) -> None:
        partial = self.state_file.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
            },
            partial,
        )
        partial.replace(self.state_file)

    def resume(self) -> None:
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]

    def train_step(
        self, ids: torch.Tensor, labels: torch.Tensor, factor: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = ids.to(self.device).long(), labels.to(self.device)
        with self.autocast():
            loss, recall = loss_fn(self.model, ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach(), recall

    def run(self, workers: int, max_minutes: float, log_every: int) -> None:
        """To the last step, or through the whole schedule in `max_minutes` if that comes first."""
        total = sum(s.steps for s in self.preset.stages)
        loader = DataLoader(
            Batches(self.seed, self.preset.stages, self.step),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
        )
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        with (self.out / "training" / "log.jsonl").open("a" if self.step else "w") as log:
            for ids, labels in tqdm(
                loader, desc="dense", mininterval=10, initial=self.step, total=total
            ):
                self.seconds = time.monotonic() - started
                progress = max(self.step / total, self.seconds / (60 * max_minutes))
                if progress >= 1:
                    break
                loss, recall = self.train_step(ids, labels, lr_factor(progress, self.step))
                self.step += 1
                if self.step % log_every == 0 or self.step == total:
                    record = {
                        "step": self.step,
                        "seconds": round(self.seconds, 2),
                        "length": ids.shape[1],
                        "lr_factor": round(lr_factor(progress, self.step), 4),
                        "loss": round(loss.item(), 4),
                        "recall_loss": round(recall.item(), 4),
                    }
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    tqdm.write(json.dumps(record))
                if time.monotonic() - saved > 60:
                    self.save_state()
                    saved = time.monotonic()
        self.save_state()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for the model; training/ holds the log"
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=max((os.cpu_count() or 1) - 2, 0), help="that write the text"
    )
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=float("inf"),
        help="finish within this time: the learning rate follows the clock where it runs ahead of "
        "the steps, so the result depends on it",
    )
    parser.add_argument("--log-every", type=int, default=25, help="steps between log records")
    parser.add_argument(
        "--require", type=float, default=0.0, help="held-out accuracy without which to exit with 1"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from OUT/training, if there is a state"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with deterministic():
        train(args)


def train(args: argparse.Namespace) -> None:
    preset = PRESETS[args.preset]
    trainer = DenseTrainer(preset, args.seed, args.out)
    print(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters on {trainer.device}")
    if args.resume and trainer.state_file.is_file():
        trainer.resume()
        print(f"resumed at step {trainer.step}")
    trainer.run(args.workers, args.max_minutes, args.log_every)
    # Accuracy is that of the weights as they are saved.
    model = trainer.model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    build_tokenizer().save_pretrained(args.out)
    accuracy = recall_accuracy(model, args.seed, preset.held_out_length, preset.held_out_documents)
    summary = {
        "preset": args.preset,
        "seed": args.seed,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "held_out_length": preset.held_out_length,
        "held_out_accuracy": accuracy,
    }
    (args.out / "training" / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    if accuracy < args.require:
        raise SystemExit(f"held-out accuracy is {accuracy:.3f}, required is {args.require}")


if __name__ == "__main__":
    main()
