"""vllm-dms: serve Dynamic Memory Sparsification checkpoints in vLLM with a compact KV cache."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of vLLM's general plugins; called once in every vLLM process."""
    from vllm_dms.plugin import register

    register()
