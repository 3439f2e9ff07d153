"""The instructions in which a GPU widens 4-bit pages, which the interpreter has none of: what they
make of every word is what `arena.storage` says."""

import inspect
import re

import numpy as np
import pytest
import torch

from vllm_dms.arena.storage import SCALE_DTYPE, Int4Storage
from vllm_dms.backend.kernels import decode_int4

WORDS = np.arange(1 << 16, dtype=np.uint32)
STEPS = np.arange(16) - 7.5
SCALE = (WORDS & 0x7FC0).astype(np.uint16).view(np.float16).astype(np.float64)
CENTER = ((WORDS & 63).astype(np.float64) - 32) / 4
IN_USE = (SCALE <= Int4Storage.MAX_VALUE_SCALE) & (WORDS < 1 << 15) & ((WORDS & 63) > 0)


def halves(x):
    """uint32 [N] -> float64 [N, 2], the lower half first."""
    return x.astype(np.uint32).view(np.float16).reshape(-1, 2).astype(np.float64)


def join(x):
    """Its inverse, rounded."""
    return x.astype(np.float16).view(np.uint32).ravel()


def execute(function, num_results, *operands):
    """What the assembly in ``function`` makes of 32-bit registers; floats, where it converts."""
    source = inspect.getsource(function.fn)
    (text,) = re.findall(r'"""\{(.*?)\}"""', source, re.DOTALL)
    names = [f"${i}" for i in range(num_results, num_results + len(operands))]
    registers = dict(zip(names, (x.astype(np.uint32) for x in operands), strict=True))

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for statement in filter(None, map(str.strip, text.split(";"))):
        name, rest = statement.split(None, 1)
        if name == ".reg":
            continue
        if rest.startswith("{"):  # the halves of a register
            low, high, whole = re.findall(r"[\w$]+", rest)
            registers[low], registers[high] = halves(value(whole)).T
            continue
        target, *args = map(str.strip, rest.split(","))
        args = [value(arg) for arg in args]
        if name == "lop3.b32":
            assert args.pop() == 0xEA  # (a & b) | c
            registers[target] = args[0] & args[1] | args[2]
        elif name.endswith(".f16x2"):
            args = [halves(np.broadcast_to(x, operands[0].shape)) for x in args]
            registers[target] = join(
                {"fma.rn": lambda a, b, c: a * b + c, "mul": lambda a, b: a * b}[name[:-6]](*args)
            )
        else:
            registers[target] = {
                "mov.b32": lambda x: x, "cvt.f32.f16": lambda x: x, "and.b32": lambda a, b: a & b,
                "shl.b32": lambda a, b: a << b, "shr.u32": lambda a, b: a >> b,
            }[name](*args)  # fmt: skip
    return [registers[f"${i}"] for i in range(num_results)]


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def pairs(words):
    """Each word beside another one: what one half holds must not matter to the other."""
    return words | words[::-1] << 16


def test_a_word_of_v_is_its_scale_and_its_center():
    scale, offset = map(halves, execute(decode_int4.value_factors, 2, pairs(WORDS)))
    for half, order in ((0, slice(None)), (1, slice(None, None, -1))):
        np.testing.assert_array_equal(scale[order, half], SCALE)
        expected = ((CENTER - 71.5) * SCALE).astype(np.float16)
        np.testing.assert_array_equal(offset[order, half], expected.astype(np.float64))


def test_a_word_of_k_is_its_scale_and_its_center():
    *scales, low, high = execute(decode_int4.key_factors, 4, pairs(WORDS))
    for scale, center, order in zip(scales, (low, high), (1, -1), strict=True):
        np.testing.assert_array_equal(scale[::order], SCALE)
        np.testing.assert_array_equal(center[::order], CENTER - 7.5)


def test_the_four_nibbles_of_k_count_one_or_sixteen():
    found = execute(decode_int4.widen_keys, 4, pairs(WORDS))
    for i, group in enumerate(map(halves, found)):
        nibble = (WORDS >> (4 * i) & 15) * (1, 16)[i % 2]
        np.testing.assert_array_equal(group[:, 0] - 1024, nibble)
        np.testing.assert_array_equal(group[::-1, 1] - 1024, nibble)


@pytest.mark.parametrize("group", range(4))
def test_v_is_what_its_words_say_to_a_25th_of_a_step(group):
    """float16 holds it, however large; nothing is left of a slot whose words are 0, and nothing
    but NaN of what the pages cannot hold."""
    scale, offset = execute(decode_int4.value_factors, 2, WORDS | WORDS << 16)
    for n in range(16):
        other = 0x9C36  # nibbles of the other groups
        word = np.uint32(other & ~(15 << 4 * group) | n << 4 * group) * np.uint32(0x10001)
        factors = [np.zeros_like(WORDS)] * 8
        factors[group], factors[4 + group] = scale, offset
        words = np.full_like(WORDS, word)
        found = halves(execute(decode_int4.widen_values, 4, words, *factors)[group])
        assert (found[:, 0] == found[:, 1])[IN_USE].all()
        assert np.isfinite(found[IN_USE]).all()
        error = np.abs(found[:, 0] - (STEPS[n] + CENTER) * SCALE)
        assert (error[IN_USE] <= SCALE[IN_USE] / 25).all()
        assert (found[SCALE == 0] == 0).all()
        assert np.isnan(found[np.isnan(SCALE)]).all()


def test_the_words_mean_that_to_the_storage():
    words = torch.from_numpy(WORDS.astype(np.uint16).view(np.int16)[IN_USE]).view(SCALE_DTYPE)
    scales = words.unsqueeze(-1).expand(-1, 4)
    for n in (0, 6, 15):
        values = torch.full((len(words), 32), n | n << 4, dtype=torch.uint8)
        expected = (STEPS[n] + CENTER[IN_USE]) * SCALE[IN_USE]
        np.testing.assert_array_equal(Int4Storage().decode(values, scales)[:, 0], expected)
    nan = torch.tensor([Int4Storage.SCALE_MASK | 32], dtype=torch.int16).view(SCALE_DTYPE)
    assert Int4Storage().decode(values[:1], nan.expand(1, 4)).isnan().all()
