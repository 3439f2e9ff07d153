"""How much of a forward is kept for its gradients, by how much memory there is."""

import torch
from torch import nn

USABLE = 0.86  # of a GPU: the rest is for fragments, libraries, and others on it
RESERVE = 5e9  # bytes for logits, the gradients in flight and the optimizer


def bytes_a_token(config, size: int) -> tuple[int, int]:
    """What one layer keeps of one token: all that its gradients need, or when recomputing."""
    hidden = config.hidden_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or hidden // heads
    attention = (2 * heads + 2 * kv_heads) * dim  # q, k, v and its output
    if active := getattr(config, "num_experts_per_tok", 0):
        mlp = active * (3 * config.moe_intermediate_size + hidden)  # each one's output is weighted
    else:
        mlp = 3 * config.intermediate_size
    everything = 4 * hidden + (heads + kv_heads) * dim + attention + mlp
    return size * everything, size * (hidden + attention)


def layers_to_recompute(model: nn.Module, tokens: int) -> int:
    """The fewest layers that must recompute for a forward of so many tokens to fit this GPU."""
    layers = model.config.num_hidden_layers
    if model.device.type != "cuda":
        return 0
    _, total = torch.cuda.mem_get_info(model.device)
    room = total * USABLE - torch.cuda.memory_allocated(model.device) - RESERVE
    # fp32 weights are trained under bf16 autocast: half of what is kept is in each.
    size = 2 if model.dtype == torch.bfloat16 else 4
    everything, little = (x * tokens for x in bytes_a_token(model.config, size))
    fitting = int((room - layers * little) / (everything - little))
    return min(max(layers - fitting, 0), layers)
