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


def nearest_of(x: torch.Tensor, *candidates: torch.Tensor) -> torch.Tensor:
    """Of each group [..., N] the candidate with the least squared error."""
    errors = torch.stack([(y - x).square().sum(-1, keepdim=True) for y in candidates])
    best = errors.argmin(0, keepdim=True).expand(1, *x.shape)
    return torch.stack(candidates).gather(0, best)[0]


def groups(x: torch.Tensor) -> torch.Tensor:
    return x.float().unflatten(-1, (Int4Storage.NUM_GROUPS, -1))


def int4_value(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """`Int4Storage`'s V, groups [..., N], with ``factor`` times its scale."""
    wide = torch.maximum(-x.amin(-1, keepdim=True) / 8, x.amax(-1, keepdim=True) / 7)
    scale = round_scale(wide * factor, mantissa_bits=3)
    return (x / scale).round().clamp(-8, 7) * scale


def centered(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """`Int4Storage`'s K once rotated, groups [..., N], with ``factor`` times its scale."""
    most = Int4Storage.MAX_CENTER
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    middle = (low + high) / 2
    wide = torch.maximum((high - low) / 15, middle.abs() * 4 / most)
    scale = round_scale(wide * factor, mantissa_bits=4)
    center = (middle / scale * 4).round().clamp(-most, most) / 4
    return ((x / scale - center + 7.5).round().clamp(0, 15) - 7.5 + center) * scale


def searched_key(k: torch.Tensor) -> torch.Tensor:
    x = rotated(groups(k))
    return rotated(nearest_of(x, *(centered(x, factor) for factor in FACTORS))).flatten(-2)


def searched_value(v: torch.Tensor) -> torch.Tensor:
    x = groups(v)
    return nearest_of(x, *(int4_value(x, factor) for factor in FACTORS)).flatten(-2)


def signed_value(v: torch.Tensor) -> torch.Tensor:
    """The eighth level on whichever side is longer: a bit more for each group."""
    x = groups(v)
    return nearest_of(x, int4_value(x), -int4_value(-x)).flatten(-2)


def centered_value(v: torch.Tensor) -> torch.Tensor:
    """A center as K has it: a byte more for each group."""
    return centered(groups(v)).flatten(-2)


_int4_key, _int4_value = of_storage(Int4Storage())
ARMS: dict[str, tuple[Rounding, Rounding]] = {
    "fp8": of_storage(FP8Storage()),
    "int4": (_int4_key, _int4_value),
    "turboquant_4bit_nc": (turboquant_key, turboquant_value),
    "turboquant_4bit_nc_as_vllm": (turboquant_key, turboquant_value),
    "int4_per_token_head": (per_token_head, per_token_head),
    "int4_key_only": (_int4_key, torch.Tensor.float),
    "int4_value_only": (torch.Tensor.float, _int4_value),
    "int4_search": (searched_key, searched_value),
    "int4_signed": (_int4_key, signed_value),
    "int4_centered": (_int4_key, centered_value),
}
AS_VLLM = "_as_vllm"  # the first and the last two layers as they are
