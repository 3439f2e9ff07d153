"""What an engine says at start-up about the cache it is going to serve from."""

from vllm_dms.arena.spec import DMSCacheSpec
from vllm_dms.config import DMSConfig

GIB = 1 << 30
MIB = 1 << 20


def expected_live_tokens(config: DMSConfig, num_tokens: int) -> float:
    """Live tokens per row if one token in ``nominal_ratio`` is kept past the window."""
    if not config.evict or config.nominal_ratio is None:
        return float(num_tokens)
    window = min(num_tokens, config.window + 1)
    return window + (num_tokens - window) / config.nominal_ratio


def banner(spec: DMSCacheSpec, config: DMSConfig, num_blocks: int, max_model_len: int) -> str:
    """A few lines; ``num_blocks`` is the pool without vLLM's null block."""
    layout = spec.layout
    side_bytes = layout.side_bytes(spec.max_num_seqs, spec.max_chunk_tokens, num_blocks)
    pool_bytes = num_blocks * layout.block_bytes
    dense = num_blocks / spec.dense_blocks(max_model_len)
    live = expected_live_tokens(config, max_model_len)
    # Half a page is unused at the end of a row, on average.
    row_pages = (live + layout.page_size / 2) / layout.page_size
    nominal = num_blocks * layout.pages_per_block / (layout.num_rows * row_pages)
    shift = "its successor" if config.shift else "the token itself"
    if not config.evict:
        fit = "eviction is off"
    elif config.nominal_ratio is None:
        fit = "the checkpoint states no compression ratio"
    else:
        fit = f"about {nominal:.1f} at the checkpoint's nominal {config.nominal_ratio:g}x"
    keeps = (
        "prefix cache on: states are kept in free blocks, each with "
        f"{layout.record_blocks * layout.block_bytes / MIB:.1f} MiB beside its pages"
    )
    return "\n".join(
        (
            f"DMS cache: {config.dialect} checkpoint, window {config.window}, each token's fate "
            f"decided by {shift}, one decision per {config.alpha_per}",
            f"  storage {layout.storage}; pages of {layout.page_size} slots, "
            f"{layout.page_bytes} bytes; blocks of "
            f"{layout.pages_per_block} pages, {layout.block_bytes} bytes on each rank",
            f"  pool {num_blocks} blocks, {pool_bytes / GIB:.2f} GiB; side state "
            f"{side_bytes / MIB:.1f} MiB ({side_bytes / pool_bytes:.2%} of the pool) for "
            f"{spec.max_num_seqs} requests",
            f"  requests of {max_model_len} tokens that fit at once: {dense:.1f} if nothing is "
            f"evicted; {fit}",
            *((f"  {keeps}",) if config.prefix_cache else ()),
        )
    )
