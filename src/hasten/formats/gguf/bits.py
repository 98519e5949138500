"""How ggml's blocks lay out the bits of codes, and fields of other types, in bytes."""

from __future__ import annotations

import torch


def spread_bits(data: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """Codes of so many bits, uint8 [n, bytes * 8 / bits], out of bytes, uint8 [n, bytes].

    Each run of `width` bytes holds `width` codes in its lowest bits, the next `width` codes above them, and so on.
    """
    runs = data.reshape(data.shape[0], -1, 1, width)
    return (runs >> _shifts(data, bits) & (1 << bits) - 1).reshape(data.shape[0], -1)


def gather_bits(codes: torch.Tensor, width: int, bits: int) -> torch.Tensor:
    """The inverse of `spread_bits`, for codes below 2**bits."""
    parts = codes.to(torch.uint8).reshape(codes.shape[0], -1, 8 // bits, width)
    found = parts[:, :, 0].clone()
    for place in range(1, 8 // bits):
        found |= parts[:, :, place] << bits * place
    return found.reshape(codes.shape[0], -1)


def cut(data: torch.Tensor, *sizes: int) -> list[torch.Tensor]:
    """Columns of bytes: so many for each field."""
    return list(data.split(list(sizes), 1))


def half(data: torch.Tensor) -> torch.Tensor:
    """Bytes [n, 2 * m] as float16 [n, m]."""
    return data.contiguous().view(torch.float16)


def raw(values: torch.Tensor) -> torch.Tensor:
    """Numbers [n, m] of any type as their bytes."""
    return values.contiguous().view(torch.uint8)


def negated(values: torch.Tensor) -> torch.Tensor:
    """-x for float16, by its sign bit: exact for zeros and for what is no number, too."""
    return (values.contiguous().view(torch.int16) ^ -0x8000).view(torch.float16)


def _shifts(like: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device).reshape(1, 1, -1, 1)
