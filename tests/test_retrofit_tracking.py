"""Records reach the tracker that was asked for, through accelerate's interface."""

import sys
from types import ModuleType

import pytest
from retrofit_runs import dense, run  # noqa: F401 - dense is a fixture

from vllm_dms.retrofit import tracking
from vllm_dms.retrofit.recipe import Recipe


class Recorder:
    """What accelerate's trackers have."""

    requires_logging_directory = True
    made: "Recorder"

    def __init__(self, run_name, logging_dir):
        self.place, self.calls = logging_dir, []
        Recorder.made = self

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


def accelerate(monkeypatch, **trackers):
    package, module = ModuleType("accelerate"), ModuleType("accelerate.tracking")
    module.LOGGER_TYPE_TO_CLASS = trackers
    monkeypatch.setitem(sys.modules, "accelerate", package)
    monkeypatch.setitem(sys.modules, "accelerate.tracking", module)


def test_every_record_is_reported(dense, tmp_path, monkeypatch):  # noqa: F811
    accelerate(monkeypatch, tensorboard=Recorder)
    run(dense("qwen3", attention_bias=False), tmp_path, "--report-to", "tensorboard", form=())
    first, second, *logged, last = Recorder.made.calls
    assert (first[0], second[0], last[0]) == ("start", "store_init_configuration", "finish")
    assert second[1][0]["ratio"] == 2 and Recorder.made.place == str(tmp_path / "training")
    assert [kwargs["step"] for _, _, kwargs in logged] == list(range(13))
    records = [values for _, (values,), _ in logged]
    assert {"kl", "lr", "live_compression", "target_ratio"} <= set(records[0])
    assert {"evaluation/kl_mean", "evaluation/live_compression"} <= set(records[-1])
    assert all(isinstance(x, int | float) for values in records for x in values.values())


def test_a_missing_tracker_is_said_before_anything_slow(dense, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("vllm_dms.retrofit.__main__.load_data", pytest.fail)
    source = dense("qwen3", attention_bias=False)

    class Unusable(Recorder):
        def __init__(self, run_name, logging_dir):
            raise ModuleNotFoundError("No module named 'wandb'")

    for missing in (True, False):
        if missing:
            monkeypatch.setitem(sys.modules, "accelerate", None)
        else:
            accelerate(monkeypatch, wandb=Unusable)
        with pytest.raises(SystemExit):
            run(source, tmp_path, "--report-to", "wandb", form=())
        assert "pip install accelerate wandb, or --report-to none" in capsys.readouterr().err


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("accelerate")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracking.tracking("tensorboard", tmp_path, Recipe(), main=True) as tracker:
        for step in range(3):
            tracker.log({"kl": step / 2, "heads": [1]}, step)
    found = events.EventAccumulator(str(tmp_path / tracking.PROJECT))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("kl")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
