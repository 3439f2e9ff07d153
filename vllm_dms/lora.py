"""LoRA over a DMS model: where it could change what is evicted.

In the adapter form decisions are those of the model with the LoRA merged: `dms_proj_alpha` reads
the residual stream, and is no linear layer of vLLM's, so vLLM refuses a LoRA with tensors for it.
"""

from vllm.config import LoRAConfig

# vLLM applies a LoRA to these as one layer, so what lets one in lets all in.
QKV = {"q_proj", "k_proj", "v_proj", "qkv_proj"}


def reaches_queries(lora: LoRAConfig | None) -> bool:
    """Whether a LoRA may change q_proj, a row of which is the borrowed channel."""
    if lora is None:
        return False
    return not lora.target_modules or bool(
        QKV & {name.rpartition(".")[-1] for name in lora.target_modules}
    )
