"""Trackers beside the log file: accelerate's, if one is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .recipe import Recipe

TRACKERS = ("none", "tensorboard", "wandb")
PROJECT = "vllm-dms-retrofit"


class Tracker:
    """Passes records on; of nested values none."""

    def __init__(self, inner=None):
        """inner: one of accelerate's, or one like them"""
        self.inner = inner

    def log(self, values: dict, step: int, prefix: str = "") -> None:
        if self.inner is None:
            return
        numbers = {prefix + k: v for k, v in values.items() if isinstance(v, int | float)}
        self.inner.log(numbers, step=step)


@contextmanager
def tracking(name: str, work: Path, recipe: Recipe, main: bool) -> Iterator[Tracker]:
    """name: one of TRACKERS; main: this process is the one that reports. It is opened at once, so
    that what is missing is said before training."""
    if name == "none" or not main:
        yield Tracker()
        return
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(work)} if kind.requires_logging_directory else {}
        inner = kind(PROJECT, **place)
        inner.start()
    except ImportError as error:
        raise ValueError(
            f"--report-to {name} needs the packages accelerate and {name} ({error}): "
            f"pip install accelerate {name}, or --report-to none."
        ) from None
    inner.store_init_configuration(recipe.to_dict())
    try:
        yield Tracker(inner)
    finally:
        inner.finish()
