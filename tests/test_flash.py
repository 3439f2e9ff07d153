"""Prefill by FlashAttention for a chunk itself, and by `prefill_stored_kernel` for the rest. Here
plain PyTorch stands in for FlashAttention, which a GPU without it also has to do without."""

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from engines import engine_args, generate, prompts, sampling, worst_error
from kernel_cases import SMALL, Case, check, gpu_cases

from vllm_dms.backend.attention import chunks
from vllm_dms.backend.flash import find_flash
from vllm_dms.reference import ReferenceModel

CASE = Case(layers=1, tuning=replace(SMALL, programs=8, copy_block=16))


TILE = 128  # keys


class PlainFlash:
    """`backend.flash.Flash` in plain PyTorch; ``calls``: lengths and window of each. As in the
    kernel, a request's last tile has keys beyond its end, with a weight of 0."""

    def __init__(self, scale):
        self.scale, self.calls = scale, []

    def __call__(self, query, key, value, starts, longest, window, output):
        lse = torch.full((query.shape[1], len(query)), float("nan"), device=query.device)
        starts = starts.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        assert max(lengths) <= longest
        self.calls.append((lengths, window))
        group = query.shape[1] // key.shape[1]
        for start, length in zip(starts, lengths, strict=False):
            rows, tiles = slice(start, start + length), -(-length // TILE) * TILE
            q = query[rows].float().transpose(0, 1)
            k, v = (x[start : start + tiles].float().transpose(0, 1) for x in (key, value))
            k, v = (x.repeat_interleave(group, 0) for x in (k, v))
            age = torch.arange(length).unsqueeze(1) - torch.arange(k.shape[1])
            seen = (age >= 0) & ((age <= window) | (window < 0))
            scores = (q @ k.mT * self.scale).masked_fill(~seen.to(q.device), float("-inf"))
            output[rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(output.dtype)
            lse[:, rows] = scores.logsumexp(-1)
        return lse


FLASH = replace(CASE, flash=PlainFlash)
LENGTHS = (1, 40, 66)


@pytest.mark.parametrize("chunks", [(256,), (33, 1, 5, 1), (64, 17)], ids=str)
@pytest.mark.parametrize("window", [1, 7, 16])
@pytest.mark.parametrize("shift", [0, 1])
def test_flash_and_the_rest_equal_the_plain_operations(window, shift, chunks):
    layers = 2 if window == 7 else 1
    check(replace(FLASH, window=window, layers=layers, shift=shift, chunks=chunks, lengths=LENGTHS))


@pytest.mark.parametrize("chunks", [(256,), (33, 1, 5, 1)], ids=str)
@pytest.mark.parametrize("shape", [{"dim": 80, "heads": 2, "group": 3, "page": 16}, {"group": 8}])
def test_without_eviction_a_chunk_sees_all_of_itself(shape, chunks):
    check(replace(FLASH, evict=False, chunks=chunks, lengths=(1, 70, 55), **shape))


class Watched:
    """A harness of one case, which says what a step asked for: lengths of the requests that flash
    attended to, its window, and whether what is stored was read."""

    def __init__(self, **changes):
        case = replace(FLASH, layers=1, window=7, **changes)
        self.harness, self.seqs = case.harness(kernels=True), case.sequences()
        self.read = []
        launchers = self.harness.ops._prefill_stored
        for itemsize, (rows, launch) in launchers.items():
            launchers[itemsize] = rows, SimpleNamespace(at=partial(self.note, launch.at))
        for index in range(len(self.seqs)):
            self.harness.start(index)

    def note(self, launch, *args):
        self.read.append(launch(*args))

    def step(self, *counts):
        self.read.clear()
        self.harness.ops._flash.calls.clear()
        work = zip(range(len(counts)), self.seqs, counts, strict=False)
        self.harness.step([part for part in work if part[2]])
        (call,) = self.harness.ops._flash.calls or [None]
        return call, bool(self.read)


@pytest.mark.parametrize(("prompt", "leaves"), [(7, False), (8, False), (9, True)])
def test_a_prompt_that_no_token_leaves_the_window_of_is_only_flash_s(prompt, leaves):
    """A query sees the window of 7 tokens and itself."""
    assert Watched(lengths=(20,)).step(prompt) == (([prompt], 7), leaves)
    assert Watched(lengths=(20,), evict=False).step(prompt) == (([prompt], -1), False)


def test_a_layer_asks_no_more_of_its_tensors_than_its_launches_need(monkeypatch):
    """Grids are the step's; flash finds out for itself what it is given."""
    watched, asked = Watched(lengths=(20,)), []
    ops = watched.harness.ops
    rows, grid = ops._rows, ops._flat_grid
    monkeypatch.setattr(ops, "_rows", lambda *args: asked.append(args[0]) or rows(*args))
    monkeypatch.setattr(ops, "_flat_grid", lambda *args: asked.append("grid") or grid(*args))
    store = store_window = ["key", "value"]
    watched.step(7)
    assert asked == ["grid", *store, *store_window]
    asked.clear()
    watched.step(1)
    assert asked == ["grid", *store, "query", "output"]


@pytest.mark.parametrize("evict", [True, False])
def test_what_is_stored_is_read_where_a_chunk_goes_on(evict):
    window = 7 if evict else -1
    watched = Watched(lengths=(40, 40, 40), evict=evict)
    assert watched.step(3) == (([3], window), False)
    assert watched.step(1, 1) == (None, False)
    assert watched.step(1, 1, 5) == (([5], window), False), "no more than the chunk's own tokens"
    assert watched.step(4, 1, 2) == (([4, 1, 2], window), True)


def test_the_builder_tells_where_chunks_are_what_they_go_on_from_and_whether_there_are_others():
    def told(*requests, known=True):
        """Of (tokens stored, query tokens) each."""
        stored, counts = torch.tensor(requests).T
        starts = torch.cat([counts[:1] * 0, counts.cumsum(0)]).int()
        ends = {"seq_lens_cpu_upper_bound": stored + counts if known else None}
        told = {"query_start_loc_cpu": starts, "max_query_len": max(counts), **ends}
        return chunks(SimpleNamespace(num_reqs=len(counts), **told))

    assert told((9, 1), (0, 1)) == (0, 0, True)
    assert told((9, 1), (0, 1), (0, 2), (0, 30)) == (2, 0, True)
    assert told((9, 1), (0, 4), (1, 30), (0, 0)) == (1, 1, True)
    assert told((0, 4), (9, 1)) == (0, 0, True)
    assert told((0, 4), (9, 2), (8, 40), (0, 0)) == (0, 9, False)
    assert told((0, 4), (9, 2), known=False) == (0, 1 << 30, False), "anything"


def flash_of_vllm(scale, dim=128, dtype=torch.bfloat16):
    try:
        return find_flash(dim, dtype, scale, torch.device("cuda"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("case", gpu_cases("flash"))
def test_flash_of_vllm_on_the_gpu(case, evict):
    flash = partial(flash_of_vllm, dim=case.dim, dtype=case.dtype)
    for lengths in [(256,), (100, 1, 1, 37), (65, 64, 66, 1)]:
        check(replace(case, evict=evict, flash=flash, chunks=lengths))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["triton", "flash"])
def test_an_engine_with_flash_is_as_near_the_reference_as_without(checkpoint, make_engine, kernels):
    flash_of_vllm(1.0, dim=64, dtype=torch.float16)
    path = checkpoint("nvidia-adapter", head_dim=64, min_margin=8.0, dtype=torch.float16)
    args = engine_args(512, enforce_eager=False, gpu_memory_utilization=0.2, dtype="float16")
    llm = make_engine(path, **args, additional_config={"dms": {"kernels": kernels}})
    reference, token_ids = ReferenceModel.from_dir(path), prompts((20, 97, 230, 700, 1200))
    for prompt, output in zip(token_ids, generate(llm, token_ids, sampling(30)), strict=True):
        assert worst_error(reference, prompt, output) < 0.1


@pytest.mark.parametrize(
    ("dim", "dtype", "device"),
    [(128, torch.bfloat16, "cpu"), (128, torch.float32, "cuda"), (512, torch.float16, "cuda")],
)
def test_flash_is_refused_where_vllm_has_none(dim, dtype, device):
    with pytest.raises(ValueError, match=r'"kernels" is "flash".* Remove "kernels"'):
        find_flash(dim, dtype, 1.0, torch.device(device))
