"""NVIDIA's own DMS in transformers, with its paged cache. Its code is in the repository of the
checkpoint, not in a package: this needs the checkpoint, downloaded before or a network."""

from contextlib import nullcontext
from typing import Any

import torch
from hugging_face import DEVICE, generate
from load import Load, run
from transformers import AutoModelForCausalLM

CHECKPOINT = "nvidia/Qwen3-8B-DMS-8x"  # not for commercial use


def measure(load: Load) -> dict[str, Any]:
    options = {"dtype": torch.bfloat16, "trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, **options).to(DEVICE)
    return {"model": CHECKPOINT, **generate(load, model, nullcontext())}


if __name__ == "__main__":
    run("transformers", measure)
