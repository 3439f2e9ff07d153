"""Kernels that start while the one before them still runs: before they wait for it they touch
nothing that it writes, and they let the next one start only after that.

On a GPU a mistake here is a race. In Triton's interpreter, where programs run one after the other,
every access has its place before or after the wait.
"""

from functools import partial

import numpy as np
import pytest
import triton.language as tl
from arena_harness import Harness
from kernel_cases import DEVICE, Case, make_kernels

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="watches Triton's interpreter")


class Watch:
    """What the programs of a launch do before they wait."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import interpreter_builder

        self.builder, self.patch = interpreter_builder, monkeypatch.setattr
        self.programs, self.early, self.wrong_order, self.waiting = 0, [], 0, True
        self._before("set_grid_idx", lambda *index: self._begin())
        self._before("create_masked_load", lambda ptr, mask, *args: self._touch(ptr, mask))
        self._before("create_masked_store", lambda ptr, value, mask, *args: self._touch(ptr, mask))
        self._before("create_atomic_rmw", lambda op, ptr, value, mask, *a: self._touch(ptr, mask))
        self.patch(tl.extra.cuda, "gdc_wait", self._wait)
        self.patch(tl.extra.cuda, "gdc_launch_dependents", self._release)

    def _before(self, name, note):
        original = getattr(self.builder, name)

        def noted(*args):
            note(*args)
            return original(*args)

        self.patch(self.builder, name, noted)

    def _begin(self):
        self.programs += 1
        self.waiting = True

    def _touch(self, ptr, mask):
        if self.waiting:
            self.early.append(ptr.data[np.broadcast_to(mask.data, ptr.data.shape)])

    def _wait(self, **kwargs):
        self.waiting = False

    def _release(self, **kwargs):
        self.wrong_order += self.waiting

    def early_outside(self, *tensors):
        """How many early accesses were to anything but ``tensors``."""
        found = np.concatenate([np.zeros(0, np.uint64), *map(np.ravel, self.early)])
        for tensor in tensors:
            first = tensor.data_ptr()
            end = first + tensor.untyped_storage().nbytes()
            found = found[(found < first) | (found >= end)]
        return len(found)


def test_nothing_is_touched_early_that_the_kernel_before_writes(monkeypatch):
    case = Case(heads=1, layers=1, group=4, window=4, evict=False, lengths=(70,))
    make_ops = partial(make_kernels, group=case.group, tuning=case.tuning, overlap=True)
    harness = Harness(make_ops, case.config(), case.layout(), 1, device=DEVICE)
    (seq,) = case.sequences()
    monkeypatch.setattr(tl.extra.cuda, "gdc_wait", lambda **kwargs: None)
    monkeypatch.setattr(tl.extra.cuda, "gdc_launch_dependents", lambda **kwargs: None)
    harness.start(0)
    harness.step([(0, seq, 69)])
    batch = harness.make_batch([(0, seq, 1)])
    query, key, value, alpha = (x[69:] for x in (seq.query, seq.key, seq.value, seq.alpha))
    output = query.clone()
    harness.ops.begin_step(batch)

    watch = Watch(monkeypatch)
    harness.ops.store(batch, 0, key, value, alpha)
    assert watch.programs == 1 and not watch.waiting
    assert watch.early_outside() == 0
    # The schedule is from before `store`, which may make the query.
    harness.ops.decode(batch, 0, query, output)
    assert watch.early_outside(harness.ops.schedule.begin) == 0
    assert watch.early_outside() > 0, "the watch sees nothing"
    assert watch.wrong_order == 0
