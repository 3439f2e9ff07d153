"""SmolLM2's way from packages to a checkpoint: weights are read as stored, text is split once."""

import json
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from examples.smollm2 import convert, gather


def test_blocks_are_dequantized_value_by_value():
    codes = np.arange(32, dtype=np.uint8) % 16
    low, high = codes[:16], codes[16:]
    q4 = np.float16([0.5, -2]).tobytes() + (low | high << 4).astype(np.uint8).tobytes()
    found = convert.dequantize(np.frombuffer(q4, np.uint8), convert.Q4_1)
    np.testing.assert_array_equal(found, codes * 0.5 - 2)
    signed = np.arange(-16, 16, dtype=np.int8)
    q8 = np.float16([0.25]).tobytes() + signed.tobytes()
    found = convert.dequantize(np.frombuffer(q8, np.uint8), convert.Q8_0)
    np.testing.assert_array_equal(found, signed * 0.25)


def test_neighbours_become_halves():
    # Two heads of 6 channels: 0 1 | 2 3 | 4 5 are pairs.
    weight = np.arange(12.0).reshape(12, 1)
    found = convert.halves_apart(weight, heads=2).flatten().tolist()
    assert found == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def gguf(path, metadata: bytes, num_keys: int, tensors: dict[str, np.ndarray]):
    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    head = convert.MAGIC + struct.pack("<IQQ", 3, len(tensors), num_keys) + metadata
    body = b""
    for name, tensor in tensors.items():
        dims = tensor.shape[::-1]
        head += text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        head += struct.pack("<IQ", convert.F32, len(body))
        body += tensor.tobytes() + bytes(-tensor.nbytes % 32)
    path.write_bytes(head + bytes(-len(head) % 32) + body)


def test_a_gguf_is_read_as_written(tmp_path):
    path = tmp_path / "a.gguf"
    key = struct.pack("<Q", 4) + b"list" + struct.pack("<IIQ", convert.ARRAY, 4, 2)
    tensors = {"a.weight": np.float32([[1, 2, 3], [4, 5, 6]]), "b.weight": np.float32([7])}
    gguf(path, key + struct.pack("<II", 8, 9), 1, tensors)
    metadata, found = convert.read_gguf(path)
    assert metadata == {"list": [8, 9]} and list(found) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ValueError, match="no GGUF file"):
        convert.read_gguf(path)


def test_a_page_is_its_text():
    page = """<head><title>no</title></head><nav>no</nav><div class="footer">no</div>
    <h1>Title<a class="headerlink">¶</a></h1><p>One  two<br>three</p>
    <ul><li><p>item</p></li></ul><pre>a
      b</pre><script>no</script>"""
    assert gather.page_text(page) == "Title\n\nOne two\nthree\n\n- item\n\na\n      b\n"


def test_each_document_is_in_one_file_whole(tmp_path):
    found = [(f"{source}/{n}", f"{source} {n}\n\n" * 3000) for source in "ab" for n in range(30)]
    found += [("a/short", "short"), ("a/again", found[0][1])]
    train, held = gather.split(iter(found))
    names = [name for name, _ in train + held]
    assert len(held) >= 10 and len(set(names)) == len(names) == 60
    gather.write(tmp_path / "train.jsonl", train, chats=4)
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    chats = [r["messages"] for r in records if "messages" in r]
    assert len(chats) == -(-len(train) // 4) and "text" in records[1]
    asked, answer = (m["content"] for m in chats[0])
    whole = asked.removeprefix("Continue this text.\n\n") + "\n\n" + answer
    assert whole == train[0][1].strip()


@pytest.mark.parametrize(("script", "more"), [("weights.sh", ""), ("build.sh", " transformers")])
def test_an_interpreter_without_torch_is_refused_by_name(tmp_path, script, more):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nshift 2\necho "$@"\n')  # it lacks all that is asked for
    python.chmod(0o755)
    path = Path(convert.__file__).with_name(script)
    command = ["bash", str(path), str(tmp_path / "work")]
    env = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{python} lacks: torch safetensors tokenizers{more}. Set PYTHON" in done.stderr
    assert not (tmp_path / "work").exists()
