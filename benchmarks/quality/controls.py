"""Controls with the memory that dms needs, in the reference model: random eviction, window only."""

from dataclasses import replace

import torch

from vllm_dms.reference import ReferenceModel, live_counts
from vllm_dms.verify import compare, first_affected

from .engine import summary
from .task import Question, Task

BIG = 1e4  # a decision logit that leaves no doubt


class Blind(ReferenceModel):
    """Evicts each token with probability rates[layer, head], whatever it is."""

    rates: torch.Tensor  # (L, H)
    generator: torch.Generator

    def alpha(self, dms, layer, x, q):
        rates = self.rates[int(layer.rsplit(".", 1)[1])]
        evict = torch.rand(len(rates), len(x), generator=self.generator) < rates[:, None]
        logit = torch.where(evict, BIG, -BIG) + dms.alpha_offset
        return (logit / dms.alpha_scale).to(x)


def run_controls(task: Task, dtype: str) -> list[dict]:
    """Fills task.starts; -> rows of both controls."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Blind.from_dir(task.model, dtype=getattr(torch, dtype), device=device)
    plain = ReferenceModel(model.config, model.weights, model.dms, model.dtype, device)
    rows = []
    for length, questions in task.questions.items():
        evicts = [plain.forward(q.prompt + q.answer).evict for q in questions]
        task.starts[length] = [first_affected(e, plain.dms.window) for e in evicts[: task.scored]]
        live = torch.stack([live_counts(e, plain.dms.window) / e.shape[-1] for e in evicts])
        outside = plain.dms.window + 1
        rates = torch.stack([e[..., :-outside].float().mean(-1) for e in evicts]).mean(0).cpu()
        tokens = sum(e.shape[-1] for e in evicts) / len(evicts)
        budget = max(round(live.mean().item() * tokens) - 1, 1)
        arms = {
            "random eviction": (rates, plain.dms.window),
            "window only": (torch.ones_like(rates), budget),
        }
        for arm, (arm_rates, window) in arms.items():
            model.rates, model.generator = arm_rates, torch.Generator().manual_seed(length)
            model.dms = replace(plain.dms, window=window)
            row = {"arm": arm, "method": "reference, teacher-forced", "window": window}
            rows.append(row | _score(model, plain, task, length))
    return rows


def _right(question: Question, logits: torch.Tensor) -> list[bool]:
    """logits (T, vocab) over prompt + answer -> per needle: each token of it is the likeliest"""
    best, start = logits.argmax(-1).tolist(), len(question.prompt) - 1
    return [
        all(best[start + i] == question.answer[i] for i in range(*span)) for span in question.spans
    ]


def _score(model: Blind, plain: ReferenceModel, task: Task, length: int) -> dict:
    rule, hits, live, dense = plain.dms, [], 0.0, 0
    kls, same = [], []
    for index, question in enumerate(task.questions[length]):
        ids = question.prompt + question.answer
        output = model.forward(ids)
        hits.append(_right(question, output.logits))
        live += live_counts(output.evict, model.dms.window).float().mean().item()
        dense += len(ids)
        if index < task.scored:
            start = first_affected(output.evict, model.dms.window)
            plain.dms = replace(rule, evict=False)
            kl, top1 = compare(output.logits[start:], plain.forward(ids).logits[start:])
            plain.dms = rule
            kls.append(kl)
            same.append(top1)
    kl, top1 = torch.cat(kls).float().numpy(), torch.cat(same).numpy()
    return task.summarize(length, hits, dense / live) | summary(kl, top1)
