"""An engine's log-probabilities against the reference's."""

from vllm_dms.reference import ReferenceModel

NOISE = 1e-3  # nats; fp32 rounding is about 3e-5, the mildest wrong rule about 3e-2


def generate(llm, token_ids, params):
    return llm.generate([{"prompt_token_ids": ids} for ids in token_ids], params, use_tqdm=False)


def worst_error(reference: ReferenceModel, prompt, output) -> float:
    """Largest difference of any returned log-probability from the reference's."""
    ids = list(output.outputs[0].token_ids)
    logits = reference.forward(prompt + ids).logits.log_softmax(-1)
    worst = 0.0
    for step, entries in enumerate(output.outputs[0].logprobs):
        row = logits[len(prompt) - 1 + step]
        worst = max(worst, *(abs(row[t].item() - lp.logprob) for t, lp in entries.items()))
    return worst
