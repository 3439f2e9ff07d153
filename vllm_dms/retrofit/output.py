"""Where a run writes: what must not be there, or does not fit, is refused before training."""

import json
import shutil
from pathlib import Path

from torch import nn

from .recipe import Recipe
from .trainer import STATE

SUMMARY, TRAINING = "summary.json", "training"
STATE_BYTES = 12  # of a trained parameter: itself and two moments in fp32
SMALL_FILES = 2**24  # bytes for logs, plots and texts


def check_out(out: Path, resume: bool) -> None:
    """Makes `out` and its training/. Refuses a directory of something else, and one with a run in
    it that is not to go on."""
    work = out / TRAINING
    found = [name for name in (STATE, SUMMARY) if (work / name).is_file()]
    if found and not resume:
        raise ValueError(
            f"--out {out} has a run in it ({TRAINING}/{found[0]}): give --resume to go on with it, "
            "or another directory."
        )
    if out.is_dir() and not work.is_dir() and any(out.iterdir()):
        raise ValueError(
            f"--out {out} has other files in it, which would be overwritten: give a new directory."
        )
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror}: {error.filename}.") from None


def check_room(out: Path, model: nn.Module, merged: bool, save_bytes: int) -> None:
    """Refuses a disk that is too full for two training states, the one before and the one that
    replaces it, and for what is written at the end."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    written = sum(p.numel() for p in model.parameters()) if merged else trained
    needed = 2 * STATE_BYTES * trained + save_bytes * written + SMALL_FILES
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(
            f"--out {out} is on a disk with {free / 1e9:.2f} GB free, but training states and the "
            f"result take up to {needed / 1e9:.2f} GB: make room, or give another directory."
        )


def finished(out: Path, recipe: Recipe) -> dict | None:
    """The evaluation of a run in `out` that came to its end, with this recipe."""
    path = out / TRAINING / SUMMARY
    if (path.parent / STATE).is_file() or not path.is_file():
        return None
    summary, mine = json.loads(path.read_text()), recipe.to_dict()
    changed = [k for k, v in summary["recipe"].items() if mine.get(k) != v]
    if changed:
        raise ValueError(
            f"--out {out} is finished, with another {', '.join(changed)}: give another directory."
        )
    return summary["evaluation"]
