"""The command line of `python -m vllm_dms.retrofit`."""

import argparse
from dataclasses import fields
from pathlib import Path

from .recipe import Recipe
from .tracking import TRACKERS

HELP = {
    "ratio": "final compression target",
    "window": "tokens that are always visible",
    "dialect": "adapter: extra weights, the base model is untouched; borrowed: a query channel of "
    "each KV head, which attention loses at once (on a small model a KL of 0.2)",
    "train": "decisions: only what decides; all: every weight",
    "steps": "optimizer steps; 0: --init as it is, of which --live moves the threshold",
    "batch": "rows a step",
    "micro_batch": "rows a forward",
    "length": "tokens a row",
    "lr": "learning rate; below about 1B parameters 2e-4 to 5e-4 work, and less evicts nothing",
    "start_ratio": "compression target of the first step: with --init that of its training",
    "ramp": "share of the run in which the target rises",
    "penalty": "weight of the share that should have been evicted and was not",
    "tau": "temperature of the gate",
    "bound": "decision logits are cut to this size while training, so that no head is lost to one "
    "side for good; 6 works, 0: none",
    "alpha_scale": "scale of the decision logit",
    "alpha_offset": "offset of the decision logit",
    "seed": "of batches and noise",
}


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        no_default = action.required or action.default is None
        return action.help if no_default else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-dms retrofit",
        formatter_class=Defaults,
        description="Trains a Qwen, Llama or Mistral model to decide what it can forget.",
        epilog="exit code 1: the ratio was missed; 130: stopped by a signal, --resume goes on",
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="directory in Hugging Face format"
    )
    parser.add_argument(
        "--data",
        required=True,
        action="append",
        help='.jsonl, .json or .parquet of records with "text" or "messages", plain text, or the '
        "name of a Hugging Face dataset, which is streamed; several times: equal parts of each",
    )
    parser.add_argument(
        "--eval-data", help="as --data, for the final evaluation (default: the end of --data)"
    )
    parser.add_argument("--split", default="train", help="of a Hugging Face dataset")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="directory for the adapter, or the checkpoint with --merge; training/ holds the log",
    )
    for field in fields(Recipe):
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=field.type,
            default=field.default,
            help=HELP[field.name],
        )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of the frozen weights while training "
        "(default: bfloat16 on a GPU, float32 on a CPU or with --train all)",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="write a whole checkpoint, not an adapter over MODEL (always so with --dialect "
        "borrowed or --train all)",
    )
    parser.add_argument(
        "--init", metavar="ADAPTER", type=Path, help="adapter whose decisions training starts from"
    )
    parser.add_argument(
        "--live",
        type=float,
        metavar="RATIO",
        help="after training, shift alpha_offset until training rows reach this live ratio at "
        "--length tokens (default: leave it)",
    )
    parser.add_argument(
        "--base-name",
        metavar="NAME",
        help="how the adapter names its base, such as Qwen/Qwen3-8B (default: MODEL's path)",
    )
    parser.add_argument("--save-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--recompute",
        type=int,
        metavar="LAYERS",
        help="layers that keep little and compute the rest again for the gradients: less memory "
        "(default: as many as this GPU needs)",
    )
    parser.add_argument(
        "--shard",
        action="store_true",
        help="under torchrun, each GPU holds only its share of the layers' weights (FSDP2): for a "
        "base that does not fit one",
    )
    parser.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the same seed gives the same file on the same kind of GPU; without, attention's "
        "gradients take less time, above all if --micro-batch times the query heads is less than "
        "a GPU's multiprocessors",
    )
    parser.add_argument(
        "--max-minutes",
        type=float,
        default=float("inf"),
        help="finish within this time: schedules follow the clock where it runs ahead of the "
        "steps, so the result depends on it",
    )
    parser.add_argument(
        "--report-to",
        choices=TRACKERS,
        default="none",
        help="a tracker beside OUT/training/log.jsonl, through the package accelerate",
    )
    parser.add_argument("--log-every", type=int, default=10, help="steps between log records")
    parser.add_argument(
        "--save-minutes", type=float, default=5.0, help="minutes between training states"
    )
    parser.add_argument(
        "--eval-rows", type=int, default=4, help="rows kept, or read of --eval-data, to judge by"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from OUT/training, if there is a state"
    )
    return parser
