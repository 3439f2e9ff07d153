"""python -m vllm_dms.retrofit MODEL --data FILE --ratio 8 --window 512 --out DIR"""

import argparse
import json
from dataclasses import fields
from pathlib import Path

import torch

from . import checkpoint, data
from .determinism import deterministic
from .plot import plot_log
from .recipe import Recipe
from .trainer import LOG, STATE, Trainer

HELP = {
    "ratio": "final compression target",
    "window": "tokens that are always visible",
    "dialect": "adapter: extra weights, the base model is untouched; borrowed: a query channel",
    "train": "decisions: only what decides; all: every weight",
    "steps": "optimizer steps",
    "batch": "rows a step",
    "micro_batch": "rows a forward",
    "length": "tokens a row",
    "lr": "learning rate",
    "ramp": "share of the run in which the target rises",
    "penalty": "weight of the share that should have been evicted and was not",
    "tau": "temperature of the gate",
    "alpha_scale": "scale of the decision logit",
    "alpha_offset": "offset of the decision logit",
    "seed": "of batches and noise",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_dms.retrofit",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Turns a dense Qwen3 or Llama checkpoint into a DMS checkpoint in NVIDIA's "
        "formats.",
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="directory in Hugging Face format"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help='.jsonl with a "text" per line, or plain text'
    )
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
        "--eval-rows", type=int, default=4, help="rows of the data kept for the final evaluation"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from OUT/training, if there is a state"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        with deterministic(args.deterministic):
            retrofit(args)
    except ValueError as error:
        parser.error(str(error))


def merged(args: argparse.Namespace, recipe: Recipe) -> bool:
    """True: the output is a whole checkpoint. Only frozen weights can be left to their owner."""
    return args.merge or recipe.dialect == "borrowed" or recipe.train == "all"


def retrofit(args: argparse.Namespace) -> dict:
    """The whole command; -> the final evaluation."""
    from transformers import AutoTokenizer

    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = recipe.train == "all" or device == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if wide else "bfloat16"))
    if recipe.train == "all" and dtype != torch.float32:
        raise ValueError(
            "--train all needs --dtype float32: bfloat16 weights swallow small updates."
        )
    model = checkpoint.load_dense(args.model, dtype).to(device)
    rows = data.load_rows(args.data, AutoTokenizer.from_pretrained(args.model), recipe.length)
    if len(rows) <= args.eval_rows:
        raise ValueError(
            f"the data holds {len(rows)} rows of {recipe.length} tokens and --eval-rows takes "
            f"{args.eval_rows} of them: give more text."
        )
    train_rows, eval_rows = rows[: len(rows) - args.eval_rows], rows[len(rows) - args.eval_rows :]
    work = args.out / "training"
    trainer = Trainer(model, train_rows, recipe, work, recompute=args.recompute)
    print(
        f"{len(train_rows)} rows of {recipe.length} tokens; "
        f"{sum(p.numel() for p in trainer.trained.values())} trained parameters in "
        f"{len(trainer.trained)} tensors"
    )
    if args.resume and (work / STATE).is_file():
        trainer.resume()
        print(f"resumed at step {trainer.step}")
    trainer.run(args.max_minutes, args.log_every, args.save_minutes)
    result = trainer.evaluate(eval_rows)
    summary = {
        "recipe": recipe.to_dict(),
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "evaluation": result,
    }
    (work / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    save_dtype = getattr(torch, args.save_dtype)
    if merged(args, recipe):
        checkpoint.save_merged(model, trainer.dms, recipe.tau, args.model, args.out, save_dtype)
    else:
        base = args.base_name or str(args.model.resolve())
        checkpoint.save_adapter(model, trainer.dms, recipe.tau, base, args.out, save_dtype)
    if not plot_log(work / LOG, work / "curves.png"):
        print("no plot: matplotlib is not installed")
    print(json.dumps(result))
    print(f"wrote {args.out}")
    return result


if __name__ == "__main__":
    main()
