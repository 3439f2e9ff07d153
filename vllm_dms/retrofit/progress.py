"""What a run says while it runs, and how it is asked to stop."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .recipe import Recipe

LINE_SECONDS = 2.0  # between lines, except the first and the last


class Progress:
    """Lines of step, loss, ratio, speed, memory and the time that is left."""

    def __init__(self, recipe: Recipe, step: int, device: torch.device):
        self.recipe, self.device = recipe, device
        self.first = self.said_step = step
        self.started = time.monotonic()
        self.said = float("-inf")
        self.compiled = self.started  # the first step also compiles, so it is left out of speeds

    def show(self, record: dict) -> None:
        step, now = record["step"], time.monotonic()
        if step == self.first:
            self.compiled = now
        elif step < self.recipe.steps - 1 and now - self.said < LINE_SECONDS:
            return
        self.said = now
        print(self.line(step, now, record), flush=True)

    def line(self, step: int, now: float, record: dict) -> str:
        recipe, done = self.recipe, step - self.first
        seconds = (now - self.compiled) / done if done else now - self.started
        left = (recipe.steps - step - 1) * seconds
        return (
            f"step {step + 1}/{recipe.steps}  KL {record['kl']:.4f}  ratio asked "
            f"{record['target_ratio']:.2f}, evicted {record['share_evicted']:.1%}, live "
            f"{record['live_compression']:.2f}x  "
            f"{recipe.batch * recipe.length / seconds:,.0f} tokens/s{self.memory()}  "
            f"{duration(left)} left"
        )

    def memory(self) -> str:
        if self.device.type != "cuda":
            return ""
        return f"  {torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextmanager
def asked_to_stop() -> Iterator[list]:
    """Inside, the first SIGINT or SIGTERM only fills the list; a second one acts as ever."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received.append(number)
        print("stopping after this step; again: at once", flush=True)
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
