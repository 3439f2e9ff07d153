"""The training loop: distil the masked student from the uncompressed teacher while the target
ratio rises."""

import copy
import json
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from . import data
from .checkpoint import prepare
from .forward import forward
from .gates import GumbelSigmoid, hard
from .losses import forward_kl, live_compression
from .memory import layers_to_recompute
from .recipe import Recipe

STATE, LOG = "state.pt", "log.jsonl"


class Trainer:
    """Owns model, optimizer and log. A run without a time limit is a pure function of (model, rows,
    recipe), however it is interrupted; on a GPU if operations are (see determinism)."""

    def __init__(
        self,
        model: nn.Module,
        rows: torch.Tensor,
        recipe: Recipe,
        work: Path,
        *,
        recompute: int | None = None,
    ):
        self.model, self.rows, self.recipe, self.work = model, rows, recipe, work
        self.dms = recipe.dms()
        # With the base frozen and no channel borrowed, the student without its mask is the teacher.
        shared = recipe.train == "decisions" and recipe.dialect == "adapter"
        self.teacher = model if shared else copy.deepcopy(model).requires_grad_(False)
        self.trained = prepare(model, self.dms, recipe.train == "all")
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.device = model.device
        # fp32 weights are trained under bf16 autocast on a GPU; bf16 weights need none.
        self.autocast = self.device.type == "cuda" and model.dtype == torch.float32
        if recompute is None:
            recompute = layers_to_recompute(model, recipe.micro_batch * recipe.length)
        self.recompute = recompute
        self.step, self.seconds = 0, 0.0
        work.mkdir(parents=True, exist_ok=True)

    def save_state(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "recipe": self.recipe.to_dict(),
            "trained": {n: p.detach().cpu() for n, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.work / (STATE + ".partial")
        torch.save(state, partial)
        partial.replace(self.work / STATE)

    def resume(self) -> None:
        state = torch.load(self.work / STATE, map_location="cpu", weights_only=True)
        mine = self.recipe.to_dict()
        changed = [k for k, v in state["recipe"].items() if mine[k] != v]
        if changed:
            raise ValueError(
                f"{self.work / STATE} was written with another {', '.join(changed)}: "
                "resume with the same settings, or start again without --resume."
            )
        with torch.no_grad():
            for name, value in state["trained"].items():
                self.trained[name].copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def run(
        self,
        max_minutes: float,
        log_every: int = 10,
        save_minutes: float = 5.0,
        stop_after: int | None = None,
    ) -> None:
        """Trains to the last step, or `max_minutes` long: schedules are squeezed into that."""
        log = (self.work / LOG).open("a" if self.step else "w")
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        bar = tqdm(total=self.recipe.steps, initial=self.step, desc="retrofit", mininterval=5)
        while self.step < self.recipe.steps and self.step != stop_after:
            self.seconds = time.monotonic() - started
            progress = max(self.step / self.recipe.steps, self.seconds / (60 * max_minutes))
            if progress >= 1:
                break
            record = self.train_step(progress, with_record=self.step % log_every == 0)
            if record:
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix(
                    kl=f"{record['kl']:.4f}",
                    target=f"{record['target_ratio']:.2f}",
                    live=f"{record['live_compression']:.2f}",
                )
            self.step += 1
            bar.update()
            if time.monotonic() - saved > 60 * save_minutes:
                self.save_state()
                saved = time.monotonic()
        bar.close()
        log.close()
        self.save_state()

    def train_step(self, progress: float, with_record: bool) -> dict | None:
        """One optimizer step; -> a log record, if asked for (it costs a device sync)."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(progress)
        batch = data.batch(self.rows, self.step, recipe.batch, recipe.seed).to(self.device)
        num_micro = recipe.batch // recipe.micro_batch
        kls, evicts = [], []
        for index, ids in enumerate(batch.split(recipe.micro_batch)):
            seed = (recipe.seed * 1_000_003 + self.step) * 64 + index
            kl, evict = self.student_loss(ids, GumbelSigmoid(recipe.tau, seed))
            shortfall = (recipe.target_share(progress) - evict.mean()).clamp_min(0)
            ((kl + recipe.penalty * shortfall) / num_micro).backward()
            kls.append(kl.detach())
            evicts.append(evict.detach())
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not with_record:
            return None
        kl, evict = torch.stack(kls).mean().item(), torch.cat(evicts, dim=1)
        share = evict.mean().item()
        penalty = recipe.penalty * max(recipe.target_share(progress) - share, 0.0)
        return {
            "step": self.step,
            "seconds": round(self.seconds, 2),
            "lr": recipe.learning_rate(progress),
            "loss": kl + penalty,
            "kl": kl,
            "penalty": penalty,
            "share_evicted": share,
            "target_ratio": recipe.target_ratio(progress),
            "live_compression": live_compression(evict, recipe.window, self.dms.shift),
            "per_head_evicted": [
                [round(r, 4) for r in layer] for layer in evict.mean((1, 3)).tolist()
            ],
        }

    def student_loss(self, ids: torch.Tensor, gate) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (B, T) -> mean KL to the teacher, decisions (L, B, H, T)"""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                teacher = forward(self.teacher, ids, None).hidden
            student = forward(self.model, ids, self.dms, gate, recompute=self.recompute)
            kl = forward_kl(student.hidden, teacher, self.model.lm_head, self.teacher.lm_head)
        return kl.mean(), student.evict

    @torch.no_grad()
    def evaluate(self, rows: torch.Tensor) -> dict:
        """The decisions as they are served, on rows (N, T) not trained on."""
        kls, matches, evicts = [], [], []
        for ids in rows.long().to(self.device).split(1):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                teacher = (
                    self.teacher.lm_head(forward(self.teacher, ids, None).hidden)
                    .float()
                    .log_softmax(-1)
                )
                output = forward(self.model, ids, self.dms, hard)
                student = self.model.lm_head(output.hidden).float().log_softmax(-1)
            # Before anything can have been evicted the two agree by construction.
            teacher, student = (x[:, self.recipe.window + 1 :] for x in (teacher, student))
            kls.append((teacher.exp() * (teacher - student)).sum(-1).flatten())
            matches.append((teacher.argmax(-1) == student.argmax(-1)).flatten())
            evicts.append(output.evict)
        kl, evict = torch.cat(kls), torch.cat(evicts, dim=1)
        return {
            "rows": len(rows),
            "kl_mean": kl.mean().item(),
            "kl_max": kl.max().item(),
            "top1_agreement": torch.cat(matches).float().mean().item(),
            "live_compression": live_compression(evict, self.recipe.window, self.dms.shift),
            "per_head_evicted": [
                [round(r, 4) for r in layer] for layer in evict.mean((1, 3)).tolist()
            ],
        }
