"""What 4-bit storage is made of: rotation, scales of few bits, nibbles in bytes."""

import torch


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Hadamard transform of x [..., N], N a power of two. Its own inverse, times N.

    Sums of two, always of the same two: kernels get the same to the bit.
    """
    size, half = x.shape[-1], 1
    while half < size:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    return x


def round_scale(scale: torch.Tensor, mantissa_bits: int, most: float) -> torch.Tensor:
    """To a positive float16 of so few bits, the smallest one instead of 0; NaN for what is none, or
    beyond ``most``."""
    mantissa, exponent = torch.frexp(scale)
    unit = 2.0 ** (mantissa_bits + 1)
    normal = torch.ldexp((mantissa * unit).round() / unit, exponent)
    step = 2.0 ** (-14 - mantissa_bits)  # of float16's subnormal numbers
    small = (scale / step).round().clamp(min=1.0) * step
    scale = torch.where(scale < 2.0**-14, small, normal)
    return torch.where(scale <= most, scale, float("nan"))


def float16_bits(x: torch.Tensor) -> torch.Tensor:
    return x.half().view(torch.int16).to(torch.int32)


def round_to_nibble(x: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """Integers 0 to 15 nearest to x; 0 in groups that are not finite."""
    return torch.where(finite, x.round().clamp(0, 15), 0.0).to(torch.uint8)


def pack(n: torch.Tensor) -> torch.Tensor:
    """Nibbles [..., 4, D / 4] -> bytes [..., D / 2]."""
    a, b, c, d = n.unbind(-2)
    return torch.stack([a | b << 4, c | d << 4], -1).flatten(-2)


def unpack(values: torch.Tensor) -> torch.Tensor:
    """bytes [..., D / 2] -> float32 [..., 4, D / 4]."""
    low, high = values.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([low & 15, low >> 4, high & 15, high >> 4], -2).float()
