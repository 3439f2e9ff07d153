"""Controls that vLLM has no way to serve, in PyTorch: tokens evicted at random, as many of each
layer and head as the checkpoint evicts. The checkpoint's own row beside them shows that the way
makes no difference."""

import numpy as np
import torch

from vllm_dms.retrofit import checkpoint
from vllm_dms.retrofit.controls import RandomEviction
from vllm_dms.retrofit.forward import forward
from vllm_dms.retrofit.gates import hard
from vllm_dms.retrofit.losses import live_compression

from .engine import summary
from .texts import Plan, perplexity


@torch.no_grad()
def blind(base, adapter, plan: Plan, dtype: str) -> list[dict]:
    model, dms = checkpoint.load_dms(adapter, getattr(torch, dtype), base)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows: dict[str, dict] = {name: {} for name in ("dms, PyTorch", "random eviction")}
    for length, texts in plan.texts.items():
        batches = [torch.tensor([ids], device=model.device) for ids in texts]
        teachers = [
            _logprobs(model, forward(model, ids, None).hidden, plan.scored) for ids in batches
        ]
        rates = torch.stack(
            [forward(model, i, dms, hard).evict.mean((1, 3)) for i in batches]
        ).mean(0)
        for name, gate in zip(rows, (hard, RandomEviction(rates, plan.seed + 1)), strict=True):
            own, kls, same, live = [], [], [], []
            for ids, truth in zip(batches, teachers, strict=True):
                output = forward(model, ids, dms, gate)
                guess = _logprobs(model, output.hidden, plan.scored)
                kls.append((truth.exp() * (truth - guess)).sum(-1).cpu().numpy())
                same.append((truth.argmax(-1) == guess.argmax(-1)).cpu().numpy())
                told = guess.gather(1, ids[0, -plan.scored :, None])
                own.append(told[:, 0].cpu().numpy())
                live.append(live_compression(output.evict, dms.window, dms.shift))
            rows[name][length] = {
                "perplexity": perplexity(own),
                **summary(np.concatenate(kls), np.concatenate(same)),
                "live_compression": len(live) / sum(1 / x for x in live),
            }
    return [{"arm": name, "method": "PyTorch", "text": text} for name, text in rows.items()]


def _logprobs(model, hidden: torch.Tensor, count: int) -> torch.Tensor:
    """(count, vocabulary): of the last tokens, each predicted by the one before"""
    return model.lm_head(hidden[0, -count - 1 : -1]).float().log_softmax(-1)
