"""Where every byte of the compact arena is: sizes and index arithmetic, no tensors.

A request holds, per (layer, KV head), one gapless run of slots::

    slot:   0 ............ W | W+1 ...................... live-1
            window ring       survivors, append-only
            token t sits at   a token that left the window without being evicted
            t mod (W+1)       is copied here, in the order of its position

Slots live in pages of ``page_size`` slots of one (layer, head); what a page looks like inside is
`storage`'s. vLLM's KV allocation is read as one array of pages: block ``b`` is pages
``[b * pages_per_block, (b + 1) * pages_per_block)``, which any layer and head of the request that
owns it may take.

Which pages a row has is listed in two levels, because few rows get anywhere near the length that
all may have. A row itself lists its first C = ``leaf_size`` pages. Further ones are listed, C at a
time, in *leaves*, which come with the blocks as the pages do: each block brings
``leaves_per_block``, and a request takes them from its own blocks, lowest first. That needs no
block that the pages don't need: a row of p pages has (p - 1) // C leaves, so that all rows together
have at most 1 / C as many leaves as pages. When leaf q is taken, (q + 1) * C pages are, and with
them its block.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the ledger reads this file, and does without torch
    from vllm_dms.arena.storage import Storage

MAX_PAGE_SIZE = 64
MIN_PAGE_SIZE = 8
MIN_LEAF_SIZE = 32  # so that rows of up to 2,048 slots in the largest pages need no leaf


@dataclass(frozen=True)
class ArenaLayout:
    """The fixed sizes of one worker's arena (``num_kv_heads`` counts this rank's heads)."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int  # W: a query sees itself and W earlier tokens whatever their verdict
    page_size: int  # P, slots per page
    block_size: int  # tokens per vLLM block
    storage: "Storage"  # how K and V are stored in a slot
    max_model_len: int
    leaf_size: int = 0  # C, pages listed by a row itself and by each of its leaves; 0: chosen

    def __post_init__(self) -> None:
        if not self.leaf_size:
            object.__setattr__(self, "leaf_size", choose_leaf_size(self.max_pages_per_row))
        pages = self.num_layers * self.num_kv_heads * self.block_size
        if pages % self.page_size:
            raise ValueError(
                f"block_size {self.block_size} x {self.num_layers} layers x {self.num_kv_heads} KV "
                f"heads is not a multiple of page_size {self.page_size}, so pages would straddle "
                "blocks. Choose another --block-size or "
                '--additional-config \'{"dms": {"page_size": ...}}\'.'
            )

    @property
    def ring_size(self) -> int:
        """Slots of the window ring, W + 1: a query's own token and the W before it."""
        return self.window + 1

    @property
    def num_rows(self) -> int:
        """(layer, head) rows of one request."""
        return self.num_layers * self.num_kv_heads

    @property
    def slot_bytes(self) -> int:
        return self.storage.slot_bytes(self.head_dim)

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.slot_bytes

    @property
    def pages_per_block(self) -> int:
        return self.num_rows * self.block_size // self.page_size

    @property
    def block_bytes(self) -> int:
        """Bytes of one vLLM block over all layers."""
        return self.pages_per_block * self.page_bytes

    @property
    def max_pages_per_row(self) -> int:
        """Pages of one row of a request of ``max_model_len`` of which nothing is evicted."""
        return -(-self.max_model_len // self.page_size)

    @property
    def max_blocks_per_request(self) -> int:
        return -(-self.num_rows * self.max_pages_per_row // self.pages_per_block)

    @property
    def max_leaves_per_row(self) -> int:
        return -(-self.max_pages_per_row // self.leaf_size) - 1

    @property
    def leaves_per_block(self) -> int:
        if self.max_leaves_per_row == 0:
            return 0
        return -(-self.pages_per_block // self.leaf_size)

    @property
    def table_width(self) -> int:
        """Entries of a row's page table: its first pages, then its leaves."""
        return self.leaf_size + self.max_leaves_per_row

    def can_rewind(self, num_tokens: int) -> bool:
        """Whether a state of so many tokens can be restored to store the last of them once more
        (`backend.snapshots`): not if that opened a page in a ring that was not full."""
        return num_tokens > self.ring_size or (num_tokens - 1) % self.page_size > 0

    @property
    def record_row_bytes(self) -> int:
        """Bytes of one row in a record: live slots, page table, verdicts; whole int32."""
        return 4 + 4 * self.table_width + -(-self.ring_size // 4) * 4

    @property
    def record_blocks(self) -> int:
        """Blocks that hold the record of a state that is kept (`backend.snapshots`): what lies
        beside its pages, after two counters."""
        return -(-(8 + self.num_rows * self.record_row_bytes) // self.block_bytes)

    def side_bytes(self, max_num_seqs: int, max_tokens: int, num_blocks: int = 0) -> int:
        """Bytes beside the arena: the state of ``max_num_seqs`` requests and the null state,
        `Scratch` for batches of ``max_tokens``, and what ``num_blocks`` blocks bring. The kernels
        have a few megabytes more, which depend on the GPU."""
        row = 4 + 4 * self.table_width + self.ring_size
        state = 8 + 4 * self.max_blocks_per_request + self.num_rows * row
        block = 4 + 4 * self.leaves_per_block * self.leaf_size
        scratch = max_tokens * self.num_kv_heads * 5
        return (max_num_seqs + 1) * state + scratch + num_blocks * block


def choose_page_size(window: int, slots_per_block: int = MAX_PAGE_SIZE) -> int:
    """Slots per page when the user sets none: the largest power of two up to a quarter of the
    window, so that the half page a row wastes on average stays near 5 % of its live slots; smaller
    if a block of ``slots_per_block`` (over all layers and heads) would not be a whole number."""
    size = MAX_PAGE_SIZE
    while size > MIN_PAGE_SIZE and (4 * size > window or slots_per_block % size):
        size //= 2
    return size


def choose_leaf_size(max_pages: int) -> int:
    """Near the square root of ``max_pages`` of a row: a power of two with the shortest page table.
    Where that is short anyhow, a row lists all of its pages itself."""
    if max_pages <= MIN_LEAF_SIZE:
        return max_pages
    sizes = [MIN_LEAF_SIZE << i for i in range(max_pages.bit_length())]
    return min(reversed(sizes), key=lambda size: size + -(-max_pages // size))
