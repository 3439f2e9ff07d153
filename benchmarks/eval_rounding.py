"""KL of a model that reads every K and V as a cache would have rounded it: no engine, any machine.

    python benchmarks/eval_rounding.py [MODEL] [--text FILE] [--arms fp8,int4]

The reference model in fp32 with nothing evicted, against itself unrounded: what a storage alone
costs, also of caches of vLLM's that need a GPU. Those are written down in quality/roundings.py from
what they store; ``_as_vllm`` leaves the first two and the last two layers as they are, as vLLM does
for TurboQuant. With FP8 FlashAttention 3 rounds queries as well, which is not followed. Arms that
begin with ``int4_`` and are no cache of vLLM's are halves and variants of `Int4Storage`. Without
--text the needle questions of the embedded checkpoint are asked. Writes
quality_rounding.json into --out; rows of other models stay.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from evaluation import EMBEDDED, RESULTS, documents, make_parser, names, stamp

from benchmarks.quality import engine
from benchmarks.quality.roundings import ARMS, AS_VLLM
from benchmarks.quality.task import Task
from vllm_dms import reference
from vllm_dms.reference import ReferenceModel


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", type=Path, nargs="?", default=EMBEDDED)
    add("--name", help="of the model in the rows, if not its directory's")
    add("--text", type=Path, help="plain text, instead of needle questions")
    add("--arms", type=names, default=[*ARMS])
    add("--length", type=int, default=2048)
    add("--documents", type=int, default=4)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS)
    return parser.parse_args(argv)


def texts_of(args: argparse.Namespace) -> list[list[int]]:
    if args.text is None:
        task = Task.build(args.model, [args.length], args.documents, 3, 0, args.seed)
        return [question.prompt + question.answer for question in task.questions[args.length]]
    return documents(args)


class Rounded(ReferenceModel):
    """Attention to K and V as an arm leaves them."""

    arm: str = ""

    def attend(self, layer: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        index, last = int(layer.rsplit(".", 1)[1]), self.config["num_hidden_layers"] - 1
        kept = self.arm.endswith(AS_VLLM) and (index < 2 or index > last - 2)
        if not self.arm or kept:
            return super().attend(layer, x, cos, sin)
        of_key, of_value = ARMS[self.arm]

        def rounded(q, k, v, mask, scale):
            return exact(q, of_key(k), of_value(v), mask, scale)

        exact, reference.attention = reference.attention, rounded
        try:
            return super().attend(layer, x, cos, sin)
        finally:
            reference.attention = exact


@torch.inference_mode()
def rows(args: argparse.Namespace) -> Iterator[dict]:
    model, texts = Rounded.from_dir(args.model), texts_of(args)
    model.dms = None  # nothing is evicted
    truths = [model.logits(ids).log_softmax(-1) for ids in texts]
    for arm in args.arms:
        model.arm, kls, same = arm, [], []
        for ids, truth in zip(texts, truths, strict=True):
            guess = model.logits(ids).log_softmax(-1)
            kls.append((truth.exp() * (truth - guess)).sum(-1))
            same.append(truth.argmax(-1) == guess.argmax(-1))
        found = engine.summary(torch.cat(kls).numpy(), torch.cat(same).numpy())
        yield {"arm": arm, "length": args.length, **found}


def main() -> None:
    args = parse_args()
    name = "vllm_dms/assets/tiny" if args.model == EMBEDDED else args.name or args.model.name
    about = {"model": name, "text": args.text.name if args.text else "needle questions"}
    origin = stamp(args)
    path = args.out / "quality_rounding.json"
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in kept if row["model"] != name]
    for row in rows(args):
        print(json.dumps(row), flush=True)
        kept.append(about | row | origin)
        path.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
