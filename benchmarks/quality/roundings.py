"""What caches make of K and V, [..., D] -> float32 [..., D], written down from what they store.

`ARMS` has a pair (of K, of V) for each. Those of DMS are its storages; the caches of vLLM are
followed in the numbers that they keep, not in the order of their sums.
"""

from collections.abc import Callable
from functools import cache
from statistics import NormalDist

import torch

from vllm_dms.arena.nibbles import rotate, round_scale
from vllm_dms.arena.storage import FP8Storage, Int4Storage, Storage

Rounding = Callable[[torch.Tensor], torch.Tensor]
FACTORS = (1.0, 0.93, 0.87, 0.8)  # of the scale that cuts nothing off, to search among


def of_storage(storage: Storage) -> tuple[Rounding, Rounding]:
    return (
        lambda k: storage.decode_key(*storage.encode_key(k)),
        lambda v: storage.decode(*storage.encode(v)),
    )


def vllm_fp8(x: torch.Tensor) -> torch.Tensor:
    """With the scale of 1 that vLLM takes where a checkpoint has none. What is beyond the largest
    number becomes that, which not every PyTorch's cast does."""
    most = torch.finfo(torch.float8_e4m3fn).max
    return x.float().clamp(-most, most).to(torch.float8_e4m3fn).float()


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Its own inverse."""
    return rotate(x) * x.shape[-1] ** -0.5


def extremes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest channel, and a 15th of the span."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return low, ((high - low) / 15).clamp(min=1e-8)


@cache
def lloyd_max(levels: int = 16) -> torch.Tensor:
    """Levels of least squared error for a normal number, ascending."""
    points = [NormalDist().inv_cdf((i + 0.5) / 20000) for i in range(20000)]
    x = torch.tensor(points)
    found = torch.linspace(-2.5, 2.5, levels)
    for _ in range(300):
        nearest = torch.bucketize(x, (found[1:] + found[:-1]) / 2)
        count = torch.bincount(nearest, minlength=levels)
        found = torch.zeros(levels).index_add(0, nearest, x) / count
    return found


def turboquant_key(k: torch.Tensor) -> torch.Tensor:
    k, levels = k.float(), lloyd_max()
    norm = k.norm(dim=-1, keepdim=True)
    x = rotated(k / (norm + 1e-8)) * k.shape[-1] ** 0.5
    x = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    return rotated(x / x.norm(dim=-1, keepdim=True)) * norm.half().float()


def turboquant_value(v: torch.Tensor) -> torch.Tensor:
    low, step = extremes(v.float())
    n = ((v - low) / step).round().clamp(0, 15)
    return n * step.half().float() + low.half().float()


def per_token_head(x: torch.Tensor) -> torch.Tensor:
    x = rotated(x.float())
    low, step = extremes(x)
    zero = (-low / step).round().clamp(0, 15)
    return rotated(((x / step + zero).round().clamp(0, 15) - zero) * step)


def groups(x: torch.Tensor) -> torch.Tensor:
    return x.float().unflatten(-1, (Int4Storage.NUM_GROUPS, -1))


def centered(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """`Int4Storage` of groups [..., N], with ``factor`` times its scale."""
    most = Int4Storage.MAX_CENTER
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    middle = (low + high) / 2
    wide = torch.maximum((high - low) / 15, middle.abs() * 4 / most)
    scale = round_scale(wide * factor, Int4Storage.MANTISSA_BITS, Int4Storage.MAX_KEY_SCALE)
    center = (middle / scale * 4).round().clamp(-most, most) / 4
    return ((x / scale - center + 7.5).round().clamp(0, 15) - 7.5 + center) * scale


def searched(x: torch.Tensor) -> torch.Tensor:
    """Groups [..., N], each with the scale of least squared error."""
    candidates = torch.stack([centered(x, factor) for factor in FACTORS])
    errors = (candidates - x).square().sum(-1, keepdim=True)
    best = errors.argmin(0, keepdim=True).expand(1, *x.shape)
    return candidates.gather(0, best)[0]


def searched_key(k: torch.Tensor) -> torch.Tensor:
    return rotated(searched(rotated(groups(k)))).flatten(-2)


def searched_value(v: torch.Tensor) -> torch.Tensor:
    return searched(groups(v)).flatten(-2)


def plain_value(v: torch.Tensor) -> torch.Tensor:
    """No center, and a scale of 8 bits: a byte less for each group."""
    x = groups(v)
    wide = torch.maximum(-x.amin(-1, keepdim=True) / 8, x.amax(-1, keepdim=True) / 7)
    scale = round_scale(wide, 3, Int4Storage.MAX_KEY_SCALE)
    return ((x / scale).round().clamp(-8, 7) * scale).flatten(-2)


def rotated_value(v: torch.Tensor) -> torch.Tensor:
    """Rotated as K is."""
    return rotated(centered(rotated(groups(v)))).flatten(-2)


_int4_key, _int4_value = of_storage(Int4Storage())
ARMS: dict[str, tuple[Rounding, Rounding]] = {
    "fp8": of_storage(FP8Storage()),
    "int4": (_int4_key, _int4_value),
    "vllm_fp8": (vllm_fp8, vllm_fp8),
    "turboquant_4bit_nc": (turboquant_key, turboquant_value),
    "turboquant_4bit_nc_as_vllm": (turboquant_key, turboquant_value),
    "int4_per_token_head": (per_token_head, per_token_head),
    "int4_key_only": (_int4_key, torch.Tensor.float),
    "int4_value_only": (torch.Tensor.float, _int4_value),
    "int4_search": (searched_key, searched_value),
    "int4_plain": (_int4_key, plain_value),
    "int4_rotated": (_int4_key, rotated_value),
}
AS_VLLM = "_as_vllm"  # the first and the last two layers as they are
