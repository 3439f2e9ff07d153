"""Storage formats and the layout around them: where every byte is, and how many there are."""

from dataclasses import fields, replace

import pytest
import torch
from arena_harness import make_config

from vllm_dms.arena.layout import ArenaLayout, choose_page_size
from vllm_dms.arena.nibbles import rotate
from vllm_dms.arena.storage import STORAGES, Int4Storage
from vllm_dms.backend.state import SideState, allocate_scratch, allocate_side_state, bind_state
from vllm_dms.gates import CACHE_DTYPES

FORMATS = [(name, dtype) for name in STORAGES for dtype in (torch.bfloat16, torch.float32)]


def make_layout(name, dtype, **overrides):
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 64, "window": 9, "page_size": 8}
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
def test_a_slot_holds_what_it_says_and_is_near_what_came(name, dtype):
    storage = STORAGES[name].for_model(dtype)
    x = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0] = 0
    key, value = storage.encode_key(x), storage.encode(x)
    num_bytes = 0
    for (values, scales), count in ((key, storage.num_k_scales), (value, storage.num_v_scales)):
        assert values.dtype == storage.dtype and values.shape == (5, 3, storage.width(64))
        assert scales.shape == (5, 3, count)
        num_bytes += sum(t.numel() * t.element_size() for t in (values, scales))
    assert num_bytes == 15 * storage.slot_bytes(64)
    limit = {"model": 0.003, "fp8": 0.03, "int4": 0.11}[name]
    for once in (storage.decode_key(*key), storage.decode(*value)):
        assert (once - x.float()).norm() <= limit * x.float().norm()
        assert once[0, 0].abs().max() < 2e-6  # an unit of the smallest scale


@pytest.mark.parametrize(("name", "dtype"), FORMATS, ids=str)
def test_rounding_makes_nothing_larger_or_smaller_on_average(name, dtype):
    storage = STORAGES[name].for_model(dtype)
    x = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide = x.double()
    decoded = (
        storage.decode_key(*storage.encode_key(x)), storage.decode(*storage.encode(x))
    )  # fmt: skip
    for out in decoded:
        assert abs((out.double() * wide).sum() / (wide * wide).sum() - 1) < 0.002


@pytest.mark.parametrize(("name", "dtype"), FORMATS[:-2], ids=str)
def test_a_second_rounding_changes_nothing(name, dtype):
    """With 4 bits it would: slots are copied as they are."""
    storage = STORAGES[name].for_model(dtype)
    once = storage.decode(*storage.encode(torch.randn(5, 3, 20).to(dtype)))
    assert torch.equal(once, storage.decode(*storage.encode(once)))


def test_int4_errs_by_half_a_step():
    """A step is a 15th of what a group spans, or by 1 / 32 more or less for the rounding of its
    scale, which may cut off the ends. The center is off by an eighth of a step."""
    storage = Int4Storage()
    x = torch.randn(1000, 4, 32, generator=torch.Generator().manual_seed(0))
    x *= 2.0 ** torch.arange(-12, 8).repeat(50)[:, None, None]
    x[..., :8] += 5 * x[:, :1, :1]  # no group is centered
    key = storage.decode_key(*storage.encode_key(x.flatten(-2))).unflatten(-1, (4, -1))
    value = storage.decode(*storage.encode(x.flatten(-2))).unflatten(-1, (4, -1))
    for out, given in ((rotate(key), rotate(x)), (value, x)):
        low, high = given.amin(-1), given.amax(-1)
        step = torch.maximum((high - low) / 15, (low + high).abs() / 2 * 4 / storage.MAX_CENTER)
        error = (out - given).abs().amax(-1)
        assert (error <= step * (0.5 + 1 / 8 + 15 / 64) * (1 + 1 / 32)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3.0e38, 2.0e6])
def test_int4_shows_what_it_cannot_hold(bad):
    storage = Int4Storage()
    x = torch.randn(128)
    x[40] = bad
    key, value = storage.decode_key(*storage.encode_key(x)), storage.decode(*storage.encode(x))
    for out in (key, value):
        assert out.isnan().nonzero().flatten().tolist() == list(range(32, 64))


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


def test_int4_holds_32k_tokens_in_a_25th_of_bfloat16s_bytes():
    """Qwen3-8B's shape, window 512, of what leaves it 12.6 % kept on average:
    blocks that a request holds, and its share of all that lies beside them."""
    num_tokens, max_num_seqs = 32768, 64
    sizes = {"num_layers": 36, "num_kv_heads": 8, "head_dim": 128, "window": 512}
    sizes |= {"page_size": choose_page_size(512), "max_model_len": num_tokens + 512}
    layout = make_layout("int4", torch.bfloat16, **sizes)
    keep = torch.tensor([0.02, 0.05, 0.09, 0.16, 0.31]).repeat(58)[: layout.num_rows]
    live = layout.ring_size + (keep * (num_tokens - layout.ring_size)).long()
    num_blocks = -(-int((-(-live // layout.page_size)).sum()) // layout.pages_per_block)
    side = layout.side_bytes(max_num_seqs, 8192, max_num_seqs * num_blocks) / max_num_seqs
    dense = layout.num_rows * num_tokens * 2 * layout.head_dim * torch.bfloat16.itemsize
    assert 25.0 < dense / (num_blocks * layout.block_bytes + side) < 25.5
