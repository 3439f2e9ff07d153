"""How K and V are stored in pages: one class for each format.

A page of P slots is K's values ``[P, width]``, V's values ``[P, width]``, then bfloat16 numbers
``[P, 2, num_scales]`` of K and V. A vector is the K or V of one token and head, [D].

A new format is a class here and an entry in `STORAGES`; what the kernels do with it goes where they
ask for `Storage.name` (`backend.kernels.pages`, `decode` and `tuning`), and its flag to `gates`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

SCALE_DTYPE = torch.bfloat16


class Pages(NamedTuple):
    """Views of whole pages: values [num_pages, P, width], scales [num_pages, P, num_scales]."""

    k: torch.Tensor
    v: torch.Tensor
    k_scales: torch.Tensor
    v_scales: torch.Tensor


@dataclass(frozen=True)
class Storage(ABC):
    """A format. ``encode`` and ``decode`` are its definition, which the kernels equal."""

    dtype: torch.dtype  # of values
    name: ClassVar[str]  # `DMSConfig.storage`, and how the kernels tell formats apart
    num_scales: ClassVar[int]  # bfloat16 numbers beside the values of a vector
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

    @abstractmethod
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values [..., width] and scales [..., num_scales] of vectors x [..., D]."""

    @abstractmethod
    def decode(self, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 [..., D] of what `encode` gave."""

    def slot_bytes(self, head_dim: int) -> int:
        """K, V and their scales."""
        vector = self.width(head_dim) * self.dtype.itemsize
        return 2 * (vector + self.num_scales * SCALE_DTYPE.itemsize)

    def view_pages(self, pages: torch.Tensor, page_size: int, head_dim: int) -> Pages:
        """``pages`` uint8 [num_pages, page_bytes]"""
        width = self.width(head_dim)
        values = page_size * width * self.dtype.itemsize  # bytes of a page's K
        end = page_size * self.slot_bytes(head_dim)

        def part(start: int, stop: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return pages[:, start:stop].view(dtype).unflatten(1, (page_size, *shape))

        scales = part(2 * values, end, SCALE_DTYPE, 2, self.num_scales)
        return Pages(
            k=part(0, values, self.dtype, width),
            v=part(values, 2 * values, self.dtype, width),
            k_scales=scales[:, :, 0],
            v_scales=scales[:, :, 1],
        )


@dataclass(frozen=True)
class ModelStorage(Storage):
    """K and V in ``dtype``, the model's own: what the model computed, unchanged."""

    name = "model"
    num_scales = 0
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
    num_scales = 1
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


STORAGES: dict[str, type[Storage]] = {kind.name: kind for kind in (ModelStorage, FP8Storage)}
