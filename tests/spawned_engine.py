"""Run an engine in processes of its own: spawned_engine.py JSON OUT_FILE.

JSON: {"model", "args", "prompts", "max_tokens"}.
OUT_FILE: per prompt [token ids, [{token: logprob}]].
"""

import json
import sys
from pathlib import Path


def main():
    from vllm import LLM, SamplingParams

    job = json.loads(sys.argv[1])
    llm = LLM(job["model"], **job["args"])
    params = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=3, detokenize=False
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in job["prompts"]], params, use_tqdm=False
    )
    result = [
        [
            list(o.outputs[0].token_ids),
            [{t: lp.logprob for t, lp in step.items()} for step in o.outputs[0].logprobs],
        ]
        for o in outputs
    ]
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
