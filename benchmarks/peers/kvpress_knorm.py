"""kvpress's KnormPress at 0.8: of a prompt the fifth of the keys with the smallest norms is kept,
in every head; what is generated is kept whole."""

import importlib.util
import sys
from typing import Any

import torch
from hugging_face import DEVICE, generate
from load import Load, run
from transformers import AutoModelForCausalLM

RATIO = 0.8  # evicted


def without_datasets() -> None:
    """kvpress imports a function of `datasets` for presses that are not used here."""
    if importlib.util.find_spec("datasets") is None:
        sys.modules["datasets"] = module = type(sys)("datasets")
        module.load_dataset = None


def measure(load: Load) -> dict[str, Any]:
    without_datasets()
    from kvpress import KnormPress

    path = f"{load.model}/dense"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(DEVICE)
    press = KnormPress(RATIO)

    class Pressed:  # `press(model)` may be entered once
        def __enter__(self) -> None:
            self.context = press(model)
            self.context.__enter__()

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(*error)

    return generate(load, model, Pressed())


if __name__ == "__main__":
    run("kvpress", measure)
