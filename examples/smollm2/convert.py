"""A Llama GGUF as a Hugging Face directory, its weights dequantized.

python examples/smollm2/convert.py FILE.gguf OUT

Knows what SmolLM2's files use: Q4_1, Q8_0, F16 and F32 tensors, and its byte-level BPE. Needs
numpy, torch, safetensors and tokenizers.
"""

import argparse
import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

MAGIC = b"GGUF"
# GGUF's value types, as struct has them.
NUMBERS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
# Tensor type -> (values, bytes) of a block.
F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCKS = {F32: (1, 4), F16: (1, 2), Q4_1: (32, 20), Q8_0: (32, 34)}
SPECIAL = 3  # tokenizer.ggml.token_type of a control token

MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Cursor:
    """Reads a GGUF header, value by value."""

    def __init__(self, data: np.ndarray):
        self.data, self.position = data, 0

    def number(self, code: str):
        size = struct.calcsize("<" + code)
        (value,) = struct.unpack("<" + code, self.bytes(size))
        return value

    def bytes(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        return self.data[start : self.position].tobytes()

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def value(self, kind: int):
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.number("I"), self.number("Q")
            return [self.value(kind) for _ in range(count)]
        return self.number(NUMBERS[kind])


def read_gguf(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """-> metadata, tensors by GGUF's names in fp32"""
    data = np.memmap(path, np.uint8, "r")
    cursor = Cursor(data)
    magic, version = cursor.bytes(4), cursor.number("I")
    if magic != MAGIC or version not in (2, 3):
        raise ValueError(f"{path} is no GGUF file of version 2 or 3.")
    num_tensors, num_keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(num_keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    described = []
    for _ in range(num_tensors):
        name = cursor.text()
        shape = [cursor.number("Q") for _ in range(cursor.number("I"))][::-1]
        described.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.position // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in described:
        if kind not in BLOCKS:
            raise ValueError(f"{path}: {name} has tensor type {kind}; known are {list(BLOCKS)}.")
        values, size = BLOCKS[kind]
        end = start + offset + int(np.prod(shape)) // values * size
        tensors[name] = dequantize(data[start + offset : end], kind).reshape(shape)
    return metadata, tensors


def dequantize(raw: np.ndarray, kind: int) -> np.ndarray:
    """Bytes -> fp32 values, flat"""
    if kind in (F32, F16):
        return raw.view(np.float32 if kind == F32 else np.float16).astype(np.float32)
    blocks = raw.reshape(-1, BLOCKS[kind][1])
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == Q8_0:
        return (blocks[:, 2:].view(np.int8) * scale).ravel()
    # Q4_1: scale, minimum, then 32 numbers in halves of 16 bytes: the low ones come first.
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    codes = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
    return (codes * scale + minimum).ravel()


def halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """RoPE pairs channels 2c and 2c + 1 in GGUF, c and c + D / 2 in transformers."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.transpose(0, 2, 1, 3).reshape(weight.shape)


def convert_weights(metadata: dict, tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    found = {}
    for name, tensor in tensors.items():
        *layer, module, _ = name.split(".")
        if module in heads:
            tensor = halves_apart(tensor, heads[module])
        prefix = f"model.layers.{layer[1]}." if layer else ""
        weight = torch.from_numpy(np.ascontiguousarray(tensor)).bfloat16()
        found[f"{prefix}{MODULES[module]}.weight"] = weight
    return found


def model_config(metadata: dict, tied: bool) -> dict:
    heads, hidden = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.3g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "torch_dtype": "bfloat16",
        **token_ids(metadata),
    }


def token_ids(metadata: dict) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "padding": "pad"}
    return {
        f"{ours}_token_id": metadata[f"tokenizer.ggml.{g}_token_id"] for g, ours in names.items()
    }


def write_tokenizer(metadata: dict, out: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the tokenizer is {'/'.join(kind)}, but only gpt2/smollm is known.")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # Digits one by one, the rest as GPT-2 splits it.
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    kinds = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    core.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in kinds if kind == SPECIAL]
    )
    core.save(str(out / "tokenizer.json"))
    ids = token_ids(metadata)
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{n}_token": tokens[ids[f"{n}_token_id"]] for n in ("bos", "eos", "pad")},
            "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": metadata["llama.context_length"],
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def convert(gguf: Path, out: Path) -> None:
    metadata, tensors = read_gguf(gguf)
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"{gguf} holds a {metadata['general.architecture']}, not a llama.")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", model_config(metadata, tied="output.weight" not in tensors))
    write_json(out / "generation_config.json", token_ids(metadata))
    write_tokenizer(metadata, out)
    save_file(convert_weights(metadata, tensors), out / "model.safetensors", {"format": "pt"})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", metavar="FILE.gguf", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    args = parser.parse_args(argv)
    convert(args.gguf, args.out)


if __name__ == "__main__":
    main()
