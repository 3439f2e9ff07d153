"""Storage formats and the layout around them: where every byte is, and how many there are."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from arena_harness import make_config

from vllm_dms.arena.layout import ArenaLayout, choose_page_size
from vllm_dms.arena.storage import STORAGES
from vllm_dms.backend.state import SideState, allocate_scratch, allocate_side_state, bind_state
from vllm_dms.gates import CACHE_DTYPES

FORMATS = [(name, dtype) for name in STORAGES for dtype in (torch.bfloat16, torch.float32)]


def make_layout(name, dtype, **overrides):
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 20, "window": 9, "page_size": 8}
    sizes |= {"block_size": 16, "max_model_len": 100, **overrides}
    return ArenaLayout(storage=STORAGES[name].for_model(dtype), **sizes)


@pytest.mark.parametrize(("name", "dtype"), FORMATS, ids=str)
def test_the_parts_of_a_page_cover_it_and_do_not_overlap(name, dtype):
    layout = make_layout(name, dtype)
    raw = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    pages = layout.storage.view_pages(raw, layout.page_size, layout.head_dim)
    for part in pages:
        assert part.shape[:2] == (2, layout.page_size)
        part.view(torch.uint8).add_(1)
    assert (raw == 1).all()
    # K and V of all slots first, as the kernels take them to be.
    pages.k.view(torch.uint8).fill_(7)
    assert (raw[:, : pages.k[0].numel() * pages.k.element_size()] == 7).all()


@pytest.mark.parametrize(("name", "dtype"), FORMATS, ids=str)
def test_a_vector_fits_its_slot_and_survives_a_second_rounding(name, dtype):
    storage = STORAGES[name].for_model(dtype)
    x = torch.randn(5, 3, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = 0
    values, scales = storage.encode(x)
    assert values.dtype == storage.dtype and values.shape == (5, 3, storage.width(20))
    assert scales.shape == (5, 3, storage.num_scales)
    bytes_of = [t.numel() * t.element_size() for t in (values, scales)]
    assert 2 * sum(bytes_of) == 15 * storage.slot_bytes(20)
    once = storage.decode(values, scales)
    torch.testing.assert_close(once, x.float(), rtol=0.07, atol=0.01)
    assert torch.equal(once, storage.decode(*storage.encode(once)))


def test_every_format_has_a_flag_and_a_setting():
    assert set(CACHE_DTYPES.values()) == set(STORAGES)
    for name in STORAGES:
        assert replace(make_config(8), storage=name).storage == name


@pytest.mark.parametrize(
    "overrides", [{}, {"max_model_len": 4096}, {"window": 64, "page_size": 16}], ids=str
)
def test_side_bytes_are_those_that_are_allocated(overrides):
    layout = make_layout("fp8", torch.bfloat16, **overrides)
    side = allocate_side_state(layout, max_num_seqs=7, device="cpu")
    scratch = allocate_scratch(layout, max_tokens=33, device="cpu")
    state = bind_state(torch.zeros(5 * layout.block_bytes, dtype=torch.uint8), layout, side)
    at_start = [getattr(side, f.name) for f in fields(SideState)]
    at_start += [scratch.num_survivors, scratch.evict]
    at_bind = [state.state_of_block, state.leaves]
    start, bind = (sum(t.untyped_storage().nbytes() for t in ts) for ts in (at_start, at_bind))
    assert layout.side_bytes(7, 33) == start
    assert layout.side_bytes(7, 33, num_blocks=5) == start + bind


@pytest.mark.parametrize(
    ("window", "max_num_seqs", "max_model_len"),
    [(512, 1024, 1 << 17), (512, 256, 1 << 20), (64, 256, 1 << 17), (16, 1024, 1 << 17)],
)
def test_side_state_stays_below_half_a_gibibyte(window, max_num_seqs, max_model_len):
    """Qwen3-8B's shape."""
    shape = {"num_layers": 36, "num_kv_heads": 8, "head_dim": 128, "window": window}
    shape |= {"page_size": choose_page_size(window), "max_model_len": max_model_len}
    layout = make_layout("model", torch.bfloat16, **shape)
    assert layout.side_bytes(max_num_seqs, max_tokens=16384) <= 1 << 29
    # And what comes with the blocks is next to nothing beside them.
    per_block = layout.side_bytes(1, 1, num_blocks=1) - layout.side_bytes(1, 1)
    assert per_block < 0.002 * layout.block_bytes


def test_the_ledger_needs_no_torch():
    script = "import sys, vllm_dms.core.ledger; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
