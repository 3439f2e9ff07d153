"""The tiny model: a Qwen3 with a structured start, and the presets that size it."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from .tokenizer import vocabulary


@dataclass(frozen=True)
class Stage:
    length: int  # tokens a row
    batch: int  # rows a step
    steps: int
    drills: float  # share of rows that are drills (see needles)


@dataclass(frozen=True)
class Preset:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    stages: tuple[Stage, ...]
    lr: float  # AdamW: embedding and norms
    muon_lr: float  # Muon: the matrices of the blocks
    held_out_length: int
    held_out_documents: int
    window: int
    max_positions: int = 8192


PRESETS = {
    "tiny": Preset(
        256,
        5,
        4,
        2,
        64,
        768,
        (
            Stage(128, 256, 200, 0.9),
            Stage(512, 128, 150, 0.2),
            Stage(1024, 64, 150, 0.1),
            Stage(4096, 32, 900, 0.1),
        ),
        lr=4e-3,
        muon_lr=8e-3,
        held_out_length=4096,
        held_out_documents=64,
        window=64,
    ),
    # Two cores, a few minutes: the same scripts at a length where a CPU learns the task.
    "smoke": Preset(
        128,
        3,
        4,
        2,
        32,
        256,
        (Stage(96, 16, 150, 0.9), Stage(256, 8, 450, 0.2)),
        lr=4e-3,
        muon_lr=8e-3,
        held_out_length=256,
        held_out_documents=16,
        window=16,
    ),
    "test": Preset(
        64,
        2,
        4,
        2,
        16,
        96,
        (Stage(64, 4, 3, 0.9), Stage(128, 2, 3, 0.2)),
        lr=0.02,
        muon_lr=0.02,
        held_out_length=128,
        held_out_documents=2,
        window=16,
    ),
}
ROPE_THETA = 100000.0
# Pairs of RoPE channels that the positional heads use: the fastest four tell neighbors apart
# and repeat only after some hundred tokens.
FAST_PAIRS = 4
# Radians that a pair of channels may turn over the whole context and still compare contents.
SLOW_TURN = 3.0
LOOK_BACK_GAIN = 1.5  # what a neighbor adds to a token, whose own embedding has rms 1


def build_model(preset: Preset, seed: int) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    vocab = vocabulary()
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=math.ceil(len(vocab) / 64) * 64,
            hidden_size=preset.hidden,
            intermediate_size=preset.intermediate,
            num_hidden_layers=preset.layers,
            num_attention_heads=preset.heads,
            num_key_value_heads=preset.kv_heads,
            head_dim=preset.head_dim,
            max_position_embeddings=preset.max_positions,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            initializer_range=0.04,
            bos_token_id=None,
            eos_token_id=vocab["<|im_end|>"],
            pad_token_id=vocab["<|endoftext|>"],
        )
    )
    _structured_start(model, preset)
    return model


@torch.no_grad()
def _structured_start(model: Qwen3ForCausalLM, preset: Preset) -> None:
    """Weights from which recall is learned in hundreds of steps rather than many thousands.

    Without biases, and with normalized queries and keys, heads that look a fixed distance back
    form very late, and heads that match by name wait for them. So layer 0 starts with the former
    (query head h writes what stands h + 1 tokens back into a space of its own), layer 1 with
    queries and keys that read those spaces, and later layers by matching equal contents.
    Everything is trained from there.
    """
    hidden, dim, heads = preset.hidden, preset.head_dim, preset.heads
    group = heads // preset.kv_heads
    model.model.embed_tokens.weight.normal_()
    model.model.embed_tokens.weight[:, 0] = 2.0
    # The tied head multiplies by embeddings of norm sqrt(hidden).
    model.model.norm.weight.fill_(hidden**-0.5)
    spaces = _orthonormal(heads * dim, hidden).view(heads, dim, hidden)
    contents = _orthonormal(preset.kv_heads * dim, hidden).view(-1, dim, hidden)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.zero_()
        attn = layer.self_attn
        if index == 0:
            _look_back(attn, preset)
            attn.v_proj.weight.copy_(contents.flatten(0, 1))
            attn.o_proj.weight.copy_(LOOK_BACK_GAIN * spaces.flatten(0, 1).T)
            continue
        values = _orthonormal(preset.kv_heads * dim, hidden).view(-1, dim, hidden)
        attn.v_proj.weight.copy_(values.flatten(0, 1))
        attn.o_proj.weight.copy_(values.repeat_interleave(group, 0).flatten(0, 1).T / group)
        if index == 1:
            # "of Maria is" looks for what comes after another "Maria is", any token for what
            # comes after its like. Both pairs of spaces hold contents of KV head 0.
            keys = [spaces[1], spaces[0]] + [spaces[-1]] * (preset.kv_heads - 2)
            queries = [spaces[0], contents[0]] + [spaces[-1]] * (preset.kv_heads - 2)
        else:
            keys = queries = list(_orthonormal(preset.kv_heads * dim, hidden).view_as(values))
        attn.k_proj.weight.copy_(torch.cat(keys))
        attn.q_proj.weight.copy_(torch.stack(queries).repeat_interleave(group, 0).flatten(0, 1))
        turn = ROPE_THETA ** (-torch.arange(0, dim, 2) / dim) * preset.held_out_length
        gain = torch.where(turn < SLOW_TURN, 2.0, 0.3).repeat(2)
        attn.q_norm.weight.copy_(gain)
        attn.k_norm.weight.copy_(gain)


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    """fp64 until it is rounded: the order in which a machine's LAPACK adds up does not show."""
    noise = torch.randn(rows, columns).double()
    q, r = torch.linalg.qr(noise if rows >= columns else noise.T)
    q *= r.diagonal().sign()
    return (q if rows >= columns else q.T).float().contiguous()


def _look_back(attn: nn.Module, preset: Preset) -> None:
    """Query head h scores highest at distance h + 1: RoPE turns its constant query onto the
    constant key there."""
    dim, half = preset.head_dim, preset.head_dim // 2
    turn = ROPE_THETA ** (-torch.arange(0, dim, 2) / dim)[:FAST_PAIRS]
    for proj in (attn.q_proj, attn.k_proj):
        proj.weight.mul_(0.1)
    for head in range(preset.kv_heads):
        attn.k_proj.weight[head * dim : head * dim + FAST_PAIRS, 0] += 0.5
    for head in range(preset.heads):
        start, distance = head * dim, head + 1
        attn.q_proj.weight[start : start + FAST_PAIRS, 0] += 0.5 * torch.cos(-distance * turn)
        attn.q_proj.weight[start + half : start + half + FAST_PAIRS, 0] += 0.5 * torch.sin(
            -distance * turn
        )
    attn.q_norm.weight.fill_(2.0)
    attn.k_norm.weight.fill_(2.0)
