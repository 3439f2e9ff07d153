"""The training loop: distil the masked student from the uncompressed teacher while the target
ratio rises."""

import copy
import json
import time
from pathlib import Path

import torch
from torch import nn

from . import data
from .calibrate import calibrate
from .checkpoint import prepare, start_from
from .evaluation import Evaluation
from .forward import forward
from .gates import GumbelSigmoid
from .losses import forward_kl, live_tokens
from .memory import layers_to_recompute
from .processes import Processes
from .progress import Progress, asked_to_stop
from .recipe import Recipe
from .sharding import shard
from .tracking import Tracker

STATE, LOG = "state.pt", "log.jsonl"
CALIBRATION_ROWS = 32


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
        processes: Processes | None = None,
        init: Path | None = None,
        device: torch.device | None = None,
    ):
        """init: an adapter whose decisions are the first ones; device: where shares of a model that
        is whole on the CPU go, if they are to be shared (processes.shard)."""
        self.processes = processes or Processes()
        num_micro = recipe.batch // recipe.micro_batch
        if num_micro % self.processes.size:
            raise ValueError(
                f"--batch {recipe.batch} is {num_micro} forwards of --micro-batch "
                f"{recipe.micro_batch}, which {self.processes.size} processes can't share evenly: "
                "give another --batch or --micro-batch."
            )
        self.model, self.rows, self.recipe, self.work = model, rows, recipe, work
        self.dms = recipe.dms()
        # With the base frozen and no channel borrowed, the student without its mask is the teacher.
        shared = recipe.train == "decisions" and recipe.dialect == "adapter"
        self.teacher = model if shared else copy.deepcopy(model).requires_grad_(False)
        self.trained = prepare(model, self.dms, recipe.train == "all")
        if init:
            start_from(init, model, self.dms, self.trained)
        if self.processes.shard:
            shard(model, self.trained.values(), device or model.device, self.processes.size)
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
        # A run that was killed has logged steps after its last state, and takes them again.
        if not self.processes.main:
            return
        log = self.work / LOG
        lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
        log.write_text("".join(x for x in lines if json.loads(x)["step"] < self.step))

    def run(
        self,
        max_minutes: float,
        log_every: int = 10,
        save_minutes: float = 5.0,
        stop_after: int | None = None,
        tokens_after: int = 0,
        tracker: Tracker | None = None,
    ) -> bool:
        """Trains to the last step, or `max_minutes` long: schedules are squeezed into that. Time is
        left for `tokens_after` more tokens at the speed of training.

        False: SIGINT or SIGTERM came, and the state is saved after the step that it found."""
        main = self.processes.main
        log = (self.work / LOG).open("a" if self.step else "w") if main else None
        started, saved = time.monotonic() - self.seconds, time.monotonic()
        progress = Progress(self.recipe, self.step, self.device)
        stopped = 0.0
        with asked_to_stop() as received:
            while self.step < self.recipe.steps and self.step != stop_after:
                self.seconds = time.monotonic() - started
                after = tokens_after * self.seconds_a_token()
                clock = (self.seconds + after) / (60 * max_minutes)
                # Processes must take the same steps: the clocks and signals of all of them count.
                clock, stopped = self.processes.agree(clock, float(bool(received)))
                share = max(self.step / self.recipe.steps, clock)
                if share >= 1:
                    self.processes.say(
                        f"--max-minutes is over at step {self.step} of {self.recipe.steps}"
                    )
                if share >= 1 or stopped:
                    break
                last = self.step == self.recipe.steps - 1
                record = self.train_step(share, with_record=last or self.step % log_every == 0)
                if record and log:
                    log.write(json.dumps(record) + "\n")
                    log.flush()
                    progress.show(record)
                    if tracker:
                        tracker.log(record, self.step)
                self.step += 1
                if main and time.monotonic() - saved > 60 * save_minutes:
                    self.save_state()
                    saved = time.monotonic()
        self.seconds = time.monotonic() - started
        if log:
            log.close()
            self.save_state()
        return not stopped

    def seconds_a_token(self) -> float:
        tokens = self.step * self.recipe.batch * self.recipe.length
        return self.seconds / tokens if tokens else 0.0

    def train_step(self, progress: float, with_record: bool) -> dict | None:
        """One optimizer step; -> a log record, if asked for (it costs a device sync)."""
        recipe = self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate(progress)
        batch = data.batch(self.rows, self.step, recipe.batch, recipe.seed).to(self.device)
        parts = list(batch.split(recipe.micro_batch))
        total = 0.0
        for index, ids in self.processes.share(parts):
            seed = (recipe.seed * 1_000_003 + self.step) * 64 + index
            kl, evict = self.student_loss(ids, GumbelSigmoid(recipe.tau, seed, recipe.bound))
            shortfall = (recipe.target_share(progress) - evict.mean()).clamp_min(0)
            ((kl + recipe.penalty * shortfall) / len(parts)).backward()
            total = total + self.figures(kl.detach(), evict.detach()) / len(parts)
        self.processes.add(p.grad for p in self.trained.values() if p.grad is not None)
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not with_record:
            return None
        self.processes.add([total])
        return self.record(progress, total)

    def figures(self, kl: torch.Tensor, evict: torch.Tensor) -> torch.Tensor:
        """kl (), evict (L, B, H, T) -> what a log record averages: KL, live tokens, share evicted
        of each layer and head."""
        live = live_tokens(evict, self.recipe.window, self.dms.shift).mean()
        return torch.cat((torch.stack((kl.float(), live)), evict.mean((1, 3)).flatten()))

    def record(self, progress: float, figures: torch.Tensor) -> dict:
        recipe = self.recipe
        kl, live, *_ = figures.tolist()
        rates = figures[2:].view(self.model.config.num_hidden_layers, -1)
        share = rates.mean().item()
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
            "live_compression": recipe.length / live,
            "per_head_evicted": [[round(r, 4) for r in layer] for layer in rates.tolist()],
        }

    def student_loss(self, ids: torch.Tensor, gate) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (B, T) -> mean KL to the teacher, decisions (L, B, H, T)"""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                teacher = forward(self.teacher, ids, None).hidden
            student = forward(self.model, ids, self.dms, gate, recompute=self.recompute)
            kl = forward_kl(student.hidden, teacher, self.model.lm_head, self.teacher.lm_head)
        return kl.mean(), student.evict

    def calibrate(self, live: float) -> None:
        """Shifts the threshold to where training rows reach the ratio `live`."""
        self.dms = calibrate(
            self.model, self.dms, self.rows[:CALIBRATION_ROWS], live, self.autocast
        )

    def evaluate(self, rows: torch.Tensor) -> dict:
        """The decisions as they are served, on rows (N, T) not trained on."""
        return Evaluation(
            self.model,
            self.dms,
            rows,
            lambda ids: forward(self.teacher, ids, None).hidden,
            self.teacher.lm_head,
            self.autocast,
        ).served()
