"""python -m vllm_dms.retrofit MODEL --data FILE --ratio 8 --window 512 --out DIR"""

import argparse
import json
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

from . import checkpoint, data
from .card import card
from .determinism import deterministic
from .evaluation import arm_line
from .plot import plot_log
from .recipe import Recipe
from .trainer import LOG, STATE, Trainer

OK, MISSED, STOPPED = 0, 1, 130
SUMMARY = "summary.json"
SLACK = 0.9  # of the ratio that was asked for: less is a miss

HELP = {
    "ratio": "final compression target",
    "window": "tokens that are always visible",
    "dialect": "adapter: extra weights, the base model is untouched; borrowed: a query channel of "
    "each KV head, which attention loses at once (on a small model a KL of 0.2)",
    "train": "decisions: only what decides; all: every weight",
    "steps": "optimizer steps",
    "batch": "rows a step",
    "micro_batch": "rows a forward",
    "length": "tokens a row",
    "lr": "learning rate; below about 1B parameters 2e-4 to 5e-4 work, and less evicts nothing",
    "ramp": "share of the run in which the target rises",
    "penalty": "weight of the share that should have been evicted and was not",
    "tau": "temperature of the gate",
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
        prog="python -m vllm_dms.retrofit",
        formatter_class=Defaults,
        description="Trains a dense Qwen3 or Llama checkpoint to decide what it can forget.",
        epilog="exit code 1: the ratio was missed; 130: stopped by a signal, --resume goes on",
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="directory in Hugging Face format"
    )
    parser.add_argument(
        "--data",
        required=True,
        help='.jsonl, .json or .parquet of records with "text" or "messages", plain text, or the '
        "name of a Hugging Face dataset, which is streamed",
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


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        with deterministic(args.deterministic):
            return retrofit(args)
    except ValueError as error:
        parser.error(str(error))


def merged(args: argparse.Namespace, recipe: Recipe) -> bool:
    """True: the output is a whole checkpoint. Only frozen weights can be left to their owner."""
    return args.merge or recipe.dialect == "borrowed" or recipe.train == "all"


def retrofit(args: argparse.Namespace) -> int:
    """The whole command; -> its exit code."""
    started = time.monotonic()
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = recipe.train == "all" or device == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if wide else "bfloat16"))
    if recipe.train == "all" and dtype != torch.float32:
        raise ValueError(
            "--train all needs --dtype float32: bfloat16 weights swallow small updates."
        )
    work = args.out / "training"
    if args.resume and not (work / STATE).is_file():
        if (work / SUMMARY).is_file():
            print(f"{args.out} is finished: nothing to resume")
            return OK
        print(f"{work / STATE} is not there: starting at step 0")
    checkpoint.check_dense(args.model, recipe.length)
    train_rows, eval_rows = load_data(args, recipe)
    model = checkpoint.load_dense(args.model, dtype, recipe.length).to(device)
    trainer = Trainer(model, train_rows, recipe, work, recompute=args.recompute)
    describe(trainer, dtype)
    if args.resume and (work / STATE).is_file():
        trainer.resume()
        print(f"resumed at step {trainer.step}")
    minutes = args.max_minutes - (time.monotonic() - started) / 60
    if not trainer.run(minutes, args.log_every, args.save_minutes):
        print(f"stopped at step {trainer.step}: --resume goes on from {work / STATE}")
        return STOPPED
    result = trainer.evaluate(eval_rows)
    write_result(args, trainer, result)
    (work / STATE).unlink()
    print(f"wrote {args.out}")
    return report(recipe, result)


def load_data(args: argparse.Namespace, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """-> rows to train on, rows to judge by"""
    from transformers import AutoTokenizer

    data.check_source(args.data)
    if args.eval_data:
        data.check_source(args.eval_data, "--eval-data")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    most = recipe.steps * recipe.batch + args.eval_rows
    rows = data.load_rows(args.data, tokenizer, recipe.length, most, args.split)
    if args.eval_data:
        held = data.load_rows(args.eval_data, tokenizer, recipe.length, args.eval_rows, args.split)
        return rows, held[: args.eval_rows]
    if len(rows) <= args.eval_rows:
        raise ValueError(
            f"the data holds {len(rows)} rows of {recipe.length} tokens and --eval-rows takes "
            f"{args.eval_rows} of them: give more text."
        )
    return rows[: len(rows) - args.eval_rows], rows[len(rows) - args.eval_rows :]


def describe(trainer: Trainer, dtype: torch.dtype) -> None:
    recipe, device = trainer.recipe, trainer.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    layers = trainer.model.config.num_hidden_layers
    trained = sum(p.numel() for p in trainer.trained.values())
    print(
        f"{where}, {str(dtype).removeprefix('torch.')}, {trainer.recompute} of {layers} layers "
        f"recomputed\n{len(trainer.rows)} rows of {recipe.length} tokens, "
        f"{recipe.steps * recipe.batch / len(trainer.rows):.2f} epochs in {recipe.steps} steps\n"
        f"{trained} trained parameters in {len(trainer.trained)} tensors",
        flush=True,
    )


def write_result(args: argparse.Namespace, trainer: Trainer, result: dict) -> None:
    model, recipe, work = trainer.model, trainer.recipe, trainer.work
    save_dtype = getattr(torch, args.save_dtype)
    if merged(args, recipe):
        checkpoint.save_merged(model, trainer.dms, recipe.tau, args.model, args.out, save_dtype)
    else:
        base = args.base_name or str(args.model.resolve())
        readme = card(base, recipe, args.data, trainer.step, result)
        checkpoint.save_adapter(model, trainer.dms, recipe.tau, base, args.out, save_dtype, readme)
    if not plot_log(work / LOG, work / "curves.png"):
        print("no plot: matplotlib is not installed")
    summary = {
        "recipe": recipe.to_dict(),
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "evaluation": result,
    }
    (work / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")


def report(recipe: Recipe, result: dict) -> int:
    """Says what was asked and what was reached; -> exit code."""
    asked, reached = recipe.live_ratio(result["length"]), result["live_compression"]
    print(
        f"asked     ratio {recipe.ratio:g} outside a window of {recipe.window}: {asked:.2f}x live "
        f"at {result['length']} tokens"
    )
    print(arm_line("reached", result))
    # Not <: a NaN must fail.
    if reached >= SLACK * asked and result["kl_mean"] < float("inf"):
        return OK
    print(
        f"MISSED: {reached:.2f}x live is less than {SLACK:.0%} of {asked:.2f}x. Raise --lr (small "
        "models need 2e-4 to 5e-4), --steps or --penalty."
    )
    return MISSED


if __name__ == "__main__":
    sys.exit(main())
