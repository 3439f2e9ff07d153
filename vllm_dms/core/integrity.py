"""What holds between any two calls of the scheduler; too slow to be checked in every step."""

import numpy as np

from vllm_dms.core.manager import DMSManager
from vllm_dms.core.prefix import PrefixCache
from vllm_dms.core.supply import assert_owned


def check_integrity(manager: DMSManager) -> None:
    """Every block of the pool is free or owned exactly once; the ledger agrees with the lists."""
    pool, ledger = manager.block_pool, manager.ledger
    held = [b for blocks in manager.req_to_blocks.values() for b in blocks]
    ids = [b.block_id for b in held]
    assert len(set(ids)) == len(ids), "a block is owned twice"
    assert pool.null_block.block_id not in ids, "the null block is owned"
    assert_owned(held)
    total = pool.get_num_free_blocks() + len(ids) + 1
    assert total == pool.num_gpu_blocks, f"{total} blocks of {pool.num_gpu_blocks} accounted for"
    assert manager.shortages.quarantine.isdisjoint(ids), "a block that names another is owned"
    assert set(ledger.requests) == {r for r, b in manager.req_to_blocks.items() if b}
    owners = {r: ledger.state_of(r) for r in ledger.requests}
    states = [s for s in owners.values() if s is not None]
    assert len(set(states)) == len(states), "a state index is owned twice"
    assert sorted(np.flatnonzero(ledger.tenancy)) == sorted(states)
    assert ledger.num_free + len(states) == manager.spec.max_num_seqs
    for request_id, state in owners.items():
        num_blocks = len(manager.req_to_blocks[request_id])
        assert num_blocks == ledger.held[state] >= 1
        assert ledger.pages[state] <= num_blocks * ledger.pages_per_block
        assert ledger.scheduled_end[state] <= ledger.safe_end[state]
    if manager.prefix is not None:
        check_kept(manager.prefix, set(ids))


def check_kept(prefix: PrefixCache, owned: set[int]) -> None:
    """Blocks of what is kept are free, and each is of one state."""
    blocks = [b for kept in prefix.kept.states for b in (*kept.blocks, *kept.record)]
    ids = [b.block_id for b in blocks]
    assert len(set(ids)) == len(ids) == prefix.kept.num_blocks, "a block is kept twice, or for none"
    assert owned.isdisjoint(ids), "a block is kept and owned"
    for block in blocks:
        assert block.ref_cnt == 0 and block.next_free_block is not None, "kept, but not free"
    for kept in prefix.kept.states:
        assert kept.blocks and kept.record
        needed = kept.mark and -(-kept.mark.num_pages // prefix.kept.pages_per_block)
        assert needed in (None, len(kept.blocks)), "more or fewer blocks than it needs"
    assert len({kept.key for kept in prefix.kept.states}) == len(prefix.kept), "kept twice"
