"""Arguments of `bench_serving` in the tests of benchmarks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_serving
from arms import ARMS, engine_args

TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 10240,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
MODEL = {"shape": "tiny", "layers": 1, "window": 4, "dialect": "d", "rates": "r", "mean_keep": 0.1}


def options(*changes, out="/o", model="/m", arms="dms", workloads="prefill-8k"):
    given = ("--model", str(model), "--out", str(out), "--arms", arms, "--workloads", workloads)
    return bench_serving.parse_args([*given, "--pool-gib", "2", "--commit", "c", *changes])


def args_of(arm, chosen):
    return [engine_args(ARMS[arm], chosen, group.limits) for group in bench_serving.groups(chosen)]
