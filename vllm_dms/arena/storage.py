"""How K and V are stored in pages: one class for each format.

A page of P slots is K's values ``[P, width]``, V's values ``[P, width]``, then for each slot the
scales of its K and of its V, as bfloat16 numbers or whatever else their bits mean to the format. A
vector is the K or V of one token and head, [D].

A new format is a class here and an entry in `STORAGES`; what the kernels do with it goes where they
ask for `Storage.name` (`backend.kernels.pages`, `decode` and `tuning`), and its flag to `gates`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from vllm_dms.arena.nibbles import (
    float16_bits,
    pack,
    rotate,
    round_scale,
    round_to_nibble,
    unpack,
)

SCALE_DTYPE = torch.bfloat16


class Pages(NamedTuple):
    """Views of whole pages: values [num_pages, P, width], scales [num_pages, P, *]."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor


@dataclass(frozen=True)
class Storage(ABC):
    """A format. ``encode`` and ``decode`` are its definition, which the kernels equal."""

    dtype: torch.dtype  # of values
    name: ClassVar[str]  # `DMSConfig.storage`, and how the kernels tell formats apart
    num_k_scales: ClassVar[int]  # bfloat16 numbers beside the values of a K
    num_v_scales: ClassVar[int]
    min_capability: ClassVar[int]  # of GPUs that the kernels run on, 89 for 8.9
    # In how many products the kernels sum over the channels, each over every num_products-th one.
    num_products: ClassVar[int] = 1

    def __str__(self) -> str:
        return self.name

    @classmethod
    @abstractmethod
    def for_model(cls, dtype: torch.dtype) -> "Storage":
        """For a model that computes K and V in ``dtype``."""

    def width(self, head_dim: int) -> int:
        """Values of a vector, in elements of ``dtype``."""
        return head_dim

    @property
    def num_scales(self) -> int:
        """Of a slot."""
        return self.num_k_scales + self.num_v_scales

    @abstractmethod
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [..., width] and scales [..., num_v_scales] of V x [..., D]."""

    @abstractmethod
    def decode(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 [..., D] of what `encode` gave."""

    def encode_key(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [..., width] and scales [..., num_k_scales] of K x [..., D]."""
        return self.encode(x)

    def decode_key(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 [..., D] of what `encode_key` gave."""
        return self.decode(values, scales)

    def slot_bytes(self, head_dim: int) -> int:
        """K, V and their scales."""
        vector = self.width(head_dim) * self.dtype.itemsize
        return 2 * vector + self.num_scales * SCALE_DTYPE.itemsize

    def view_pages(self, pages: torch.Tensor, page_size: int, head_dim: int) -> Pages:
        """``pages`` uint8 [num_pages, page_bytes]"""
        width = self.width(head_dim)
        values = page_size * width * self.dtype.itemsize  # bytes of a page's K
        end = page_size * self.slot_bytes(head_dim)

        def part(start: int, stop: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return pages[:, start:stop].view(dtype).unflatten(1, (page_size, *shape))

        scales = part(2 * values, end, SCALE_DTYPE, self.num_scales)
        return Pages(
            k=part(0, values, self.dtype, width),
            v=part(values, 2 * values, self.dtype, width),
            k_scales=scales[:, :, : self.num_k_scales],
            v_scales=scales[:, :, self.num_k_scales :],
        )


@dataclass(frozen=True)
class ModelStorage(Storage):
    """K and V in ``dtype``, the model's own: what the model computed, unchanged."""

    name = "model"
    num_k_scales = num_v_scales = 0
    min_capability = 80

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @classmethod
    def for_model(cls, dtype: torch.dtype) -> "Storage":
        return cls(dtype)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.to(self.dtype), x.new_empty((*x.shape[:-1], 0), dtype=SCALE_DTYPE)

    def decode(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return values.float()


@dataclass(frozen=True)
class FP8Storage(Storage):
    """e4m3 with a scale per vector: the largest channel is at e4m3's largest number."""

    dtype: torch.dtype = torch.float8_e4m3fn
    name = "fp8"
    num_k_scales = num_v_scales = 1
    min_capability = 89  # the first that converts FP8 itself
    num_products = 2

    @classmethod
    def for_model(cls, dtype: torch.dtype) -> "Storage":
        return cls()

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, limit = x.float(), torch.finfo(self.dtype).max
        scales = (x.abs().amax(-1, keepdim=True) / limit).to(SCALE_DTYPE)
        # A vector that small, down to zeros, becomes zeros: its reciprocal would be infinite.
        small = scales < torch.finfo(SCALE_DTYPE).tiny
        scales = torch.where(small, torch.ones_like(scales), scales)
        # A product with the reciprocal: a division for each channel costs more than the store.
        return (x * (1.0 / scales.float())).clamp(-limit, limit).to(self.dtype), scales

    def decode(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return values.float() * scales.float()


@dataclass(frozen=True)
class Int4Storage(Storage):
    """4 bits a channel, in four groups of D / 4 channels, each with a scale and a center: n stands
    for (n - 7.5 + center) * scale.

    K is rotated within its groups, which spreads channels that are always large. A group with NaN
    or infinity, or whose scale would be too large, is NaN as a whole.

    Word w of a vector, 16 bits, is channel w of each group, the first group's lowest. A scale is 16
    bits: a positive float16 whose last ``CENTER_BITS`` count the center's quarter steps, from -32.
    """

    dtype: torch.dtype = torch.uint8
    name = "int4"
    num_k_scales = num_v_scales = 4
    min_capability = 80
    num_products = 4

    NUM_GROUPS: ClassVar[int] = 4
    MANTISSA_BITS: ClassVar[int] = 4  # of a scale
    SCALE_MASK: ClassVar[int] = 0x7FC0  # all of it: NaN
    CENTER_BITS: ClassVar[int] = 6
    MAX_CENTER: ClassVar[int] = 31  # in quarters of a step
    MAX_KEY_SCALE: ClassVar[float] = 65504.0
    MAX_VALUE_SCALE: ClassVar[float] = 512.0  # decode adds scale * (center - 71.5), in float16

    @classmethod
    def for_model(cls, dtype: torch.dtype) -> "Storage":
        return cls()

    def width(self, head_dim: int) -> int:
        if head_dim < 64 or head_dim & (head_dim - 1):
            raise ValueError(f"int4 needs a head_dim of 64, 128, 256, ..., not {head_dim}")
        return head_dim // 2

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._encode(self._groups(x), self.MAX_VALUE_SCALE)

    def decode(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return self._decode(values, scales).flatten(-2)

    def encode_key(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._encode(rotate(self._groups(x)), self.MAX_KEY_SCALE)

    def decode_key(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        x = self._decode(values, scales)
        return (rotate(x) / x.shape[-1]).flatten(-2)

    def _groups(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().unflatten(-1, (self.NUM_GROUPS, -1))

    def _encode(self, x: torch.Tensor, most: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Groups [..., 4, D / 4], with scales of at most ``most``."""
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        middle = (low + high) * 0.5
        wide = torch.maximum((high - low) * (1 / 15), middle.abs() * (4 / self.MAX_CENTER))
        scale = round_scale(wide, self.MANTISSA_BITS, most)
        finite = ~scale.isnan()
        reciprocal = 1.0 / scale
        center = torch.where(finite, (middle * reciprocal * 4.0).round(), 0.0)
        center = center.clamp(-self.MAX_CENTER, self.MAX_CENTER)
        n = round_to_nibble(x * reciprocal - center * 0.25 + 7.5, finite)
        bits = torch.where(finite, float16_bits(scale), self.SCALE_MASK)
        word = bits | (center.int() + (1 << (self.CENTER_BITS - 1)))
        return pack(n), word.squeeze(-1).to(torch.int16).view(SCALE_DTYPE)

    def _decode(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        word = scales.contiguous().view(torch.int16)
        scale = (word & self.SCALE_MASK).view(torch.float16).float()
        half = 1 << (self.CENTER_BITS - 1)
        center = ((word & (2 * half - 1)) - half) * 0.25
        return (unpack(values) - 7.5 + center.unsqueeze(-1)) * scale.unsqueeze(-1)


STORAGES: dict[str, type[Storage]] = {
    kind.name: kind for kind in (ModelStorage, FP8Storage, Int4Storage)
}
