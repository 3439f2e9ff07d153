"""python -m vllm_dms.retrofit MODEL --data FILE --ratio 8 --window 512 --out DIR"""

import argparse
import json
import sys
import time
from dataclasses import fields, replace

import torch

from . import checkpoint, data
from .arguments import build_parser
from .calibrate import check_live
from .card import card
from .determinism import deterministic
from .evaluation import arm_line
from .output import SUMMARY, TRAINING, check_out, check_room, finished
from .plot import plot_evaluation, plot_log
from .processes import Processes, joined
from .recipe import Recipe
from .sharding import check_shard, held
from .tracking import Tracker, tracking
from .trainer import CALIBRATION_ROWS, LOG, STATE, Trainer

OK, MISSED, REFUSED, STOPPED = 0, 1, 2, 130
SLACK = 0.9  # of the ratio that was asked for: less is a miss


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        with deterministic(args.deterministic), joined() as (processes, device):
            return retrofit(args, processes, device)
    except ValueError as error:
        parser.exit(REFUSED, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:  # while it loads, or after the last step
        state = args.out / TRAINING / STATE
        print(f"stopped: --resume goes on from {state}" if state.is_file() else "stopped")
        return STOPPED


def merged(args: argparse.Namespace, recipe: Recipe) -> bool:
    """True: the output is a whole checkpoint. Only frozen weights can be left to their owner."""
    return args.merge or recipe.dialect == "borrowed" or recipe.train == "all"


def retrofit(args: argparse.Namespace, processes: Processes, device: torch.device) -> int:
    """The whole command; -> its exit code."""
    started = time.monotonic()
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    processes = replace(processes, shard=args.shard)
    dtype = check(args, recipe, processes, device)
    work = args.out / TRAINING
    if args.resume and not (work / STATE).is_file():
        result = finished(args.out, recipe)
        if result:
            processes.say(f"{args.out} is finished: nothing to resume")
            return report(recipe, result, args.live) if processes.main else OK
        processes.say(f"{work / STATE} is not there: starting at step 0")
    with tracking(args.report_to, work, recipe, processes.main) as tracker:
        train_rows, eval_rows = load_data(args, recipe)
        trainer = make_trainer(args, recipe, train_rows, dtype, processes, device)
        # What has passed counts, and so does what comes after the last step.
        minutes = max(args.max_minutes - (time.monotonic() - started) / 60, 1e-9)
        after, often = eval_rows.numel(), (args.log_every, args.save_minutes)
        if not trainer.run(minutes, *often, tokens_after=after, tracker=tracker):
            processes.say(f"stopped at step {trainer.step}: --resume goes on from {work / STATE}")
            return STOPPED
        return conclude(args, trainer, eval_rows, tracker)


def check(
    args: argparse.Namespace, recipe: Recipe, processes: Processes, device: torch.device
) -> torch.dtype:
    """Refuses what does not go together, before anything slow; -> dtype of the frozen weights"""
    wide = recipe.train == "all" or device.type == "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if wide else "bfloat16"))
    if recipe.train == "all" and dtype != torch.float32:
        raise ValueError(
            "--train all needs --dtype float32: bfloat16 weights swallow small updates."
        )
    for flag, value in (("--eval-rows", args.eval_rows), ("--log-every", args.log_every)):
        if value < 1:
            raise ValueError(f"{flag} is {value}, but it must be at least 1.")
    checkpoint.check_dense(args.model, recipe.length)
    if processes.shard:
        check_shard(processes, recipe, merged(args, recipe))
    if not recipe.steps and not (args.init and args.live):
        raise ValueError(
            "--steps is 0, so nothing is trained: give --init ADAPTER and --live RATIO, to move "
            "that adapter's threshold."
        )
    if args.live:
        check_live(args.live, recipe.window, recipe.length)
    if processes.main:
        check_out(args.out, args.resume)
    return dtype


def make_trainer(
    args: argparse.Namespace,
    recipe: Recipe,
    rows: torch.Tensor,
    dtype: torch.dtype,
    processes: Processes,
    device: torch.device,
) -> Trainer:
    """At step 0, or where --resume finds it."""
    model = checkpoint.load_dense(args.model, dtype, recipe.length)
    model = model if processes.shard else model.to(device)
    work = args.out / TRAINING
    trainer = Trainer(
        model,
        rows,
        recipe,
        work,
        recompute=args.recompute,
        processes=processes,
        init=args.init,
        device=device,
    )
    if processes.main:
        check_room(args.out, model, merged(args, recipe), getattr(torch, args.save_dtype).itemsize)
    processes.say(description(trainer, dtype))
    if args.resume and (work / STATE).is_file():
        trainer.resume()
        processes.say(f"resumed at step {trainer.step}")
    return trainer


def conclude(
    args: argparse.Namespace, trainer: Trainer, eval_rows: torch.Tensor, tracker: Tracker
) -> int:
    """Threshold, evaluation and files; -> exit code"""
    processes, recipe = trainer.processes, trainer.recipe
    if not processes.main and not processes.shard:  # a shard's weights are asked for until the end
        return OK
    if args.live:
        trainer.calibrate(args.live)
        processes.say(f"alpha_offset {recipe.alpha_offset:g} -> {trainer.dms.alpha_offset:g}")
    result = trainer.evaluate(eval_rows)
    if not processes.main:
        return OK
    tracker.log(result, trainer.step, "evaluation/")
    write_result(args, trainer, result)
    (trainer.work / STATE).unlink()
    print(f"wrote {args.out}")
    return report(recipe, result, args.live)


def load_data(args: argparse.Namespace, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """-> rows to train on, rows to judge by"""
    from transformers import AutoTokenizer

    for source in args.data:
        data.check_source(source)
    if args.eval_data:
        data.check_source(args.eval_data, "--eval-data")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    most = max(recipe.steps * recipe.batch, CALIBRATION_ROWS) + args.eval_rows
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


def description(trainer: Trainer, dtype: torch.dtype) -> str:
    recipe, device, size = trainer.recipe, trainer.device, trainer.processes.size
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    layers = trainer.model.config.num_hidden_layers
    trained = sum(p.numel() for p in trainer.trained.values())
    return (
        f"{where}{f' x {size}' if size > 1 else ''}, {str(dtype).removeprefix('torch.')}, "
        f"{trainer.recompute} of {layers} layers recomputed\n"
        f"{len(trainer.rows)} rows of {recipe.length} tokens, "
        f"{recipe.steps * recipe.batch / len(trainer.rows):.2f} epochs in {recipe.steps} steps\n"
        f"{trained} trained parameters in {len(trainer.trained)} tensors; "
        f"{held(trainer.model)} parameters held"
    )


def write_result(args: argparse.Namespace, trainer: Trainer, result: dict) -> None:
    model, recipe, work = trainer.model, trainer.recipe, trainer.work
    save_dtype = getattr(torch, args.save_dtype)
    if merged(args, recipe):
        checkpoint.save_merged(model, trainer.dms, recipe.tau, args.model, args.out, save_dtype)
    else:
        base = args.base_name or str(args.model.resolve())
        readme = card(base, recipe, args.data, trainer.step, result, args.init, args.live)
        checkpoint.save_adapter(model, trainer.dms, recipe.tau, base, args.out, save_dtype, readme)
    summary = {
        "recipe": recipe.to_dict(),
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "alpha_offset": trainer.dms.alpha_offset,
        "evaluation": result,
    }
    (work / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    drawn = plot_log(work / LOG, work / "curves.png")
    if not plot_evaluation({"reached": result}, args.out / "evaluation.png") or not drawn:
        print("no plots: matplotlib is not installed")


def report(recipe: Recipe, result: dict, live: float | None = None) -> int:
    """Says what was asked and what was reached; -> exit code."""
    asked, reached = live or recipe.live_ratio(result["length"]), result["live_compression"]
    what = "--live" if live else f"ratio {recipe.ratio:g} outside a window of {recipe.window}"
    print(f"asked     {what}: {asked:.2f}x live at {result['length']} tokens")
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
