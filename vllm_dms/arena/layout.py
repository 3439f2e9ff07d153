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
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the ledger reads this file, and does without torch
    from vllm_dms.arena.storage import Storage

MAX_PAGE_SIZE = 64
MIN_PAGE_SIZE = 8


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

    def __post_init__(self) -> None:
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

    def side_bytes(self, max_num_seqs: int, max_tokens: int) -> int:
        """Bytes that plain PyTorch operations need beside the arena: `SideState` of
        ``max_num_seqs`` requests and the null state, `Scratch` for batches of ``max_tokens``."""
        row = 4 + 4 * self.max_pages_per_row + self.ring_size
        state = 4 + 4 * self.max_blocks_per_request + self.num_rows * row
        return (max_num_seqs + 1) * state + max_tokens * self.num_kv_heads * 5


def choose_page_size(window: int, slots_per_block: int = MAX_PAGE_SIZE) -> int:
    """Slots per page when the user sets none: the largest power of two up to a quarter of the
    window, so that the half page a row wastes on average stays near 5 % of its live slots; smaller
    if a block of ``slots_per_block`` (over all layers and heads) would not be a whole number."""
    size = MAX_PAGE_SIZE
    while size > MIN_PAGE_SIZE and (4 * size > window or slots_per_block % size):
        size //= 2
    return size
