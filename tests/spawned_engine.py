"""Run an engine in processes of its own: spawned_engine.py JSON OUT_FILE.

JSON: {"model", "args", "prompts", "max_tokens"}.
OUT_FILE: {"answers": per prompt [token ids, [{token: logprob}]],
           "metrics": {name: [value of each engine]}, those of DMS}.
"""

import asyncio
import json
import sys
from pathlib import Path


def metrics() -> dict[str, list[float]]:
    from vllm.v1.metrics.reader import get_metrics_snapshot

    values: dict[str, list[float]] = {}
    for metric in get_metrics_snapshot():
        if metric.name.startswith("vllm:dms_"):
            values.setdefault(metric.name.removeprefix("vllm:dms_"), []).append(metric.value)
    return values


async def run(job: dict) -> dict:
    """All prompts at once, through the front end that `vllm serve` has."""
    from vllm import AsyncEngineArgs, SamplingParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(job["model"], **job["args"]))
    params = SamplingParams(
        temperature=0,
        max_tokens=job["max_tokens"],
        ignore_eos=True,
        logprobs=3,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def one(index: int, ids: list[int]) -> list:
        prompt = {"prompt_token_ids": ids}
        (output,) = [o async for o in engine.generate(prompt, params, request_id=str(index))]
        steps = output.outputs[0].logprobs
        return [
            list(output.outputs[0].token_ids),
            [{token: entry.logprob for token, entry in step.items()} for step in steps],
        ]

    try:
        answers = await asyncio.gather(*(one(i, ids) for i, ids in enumerate(job["prompts"])))
        return {"answers": answers, "metrics": metrics()}
    finally:
        engine.shutdown()


def main():
    job = json.loads(sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps(asyncio.run(run(job))))


if __name__ == "__main__":
    main()
