"""Codes of 1 to 8 bits packed into bytes, in the one order that all formats are brought to.

The bits of a code are split into planes of 4, 2 and 1 bits (a whole byte for 8), lowest first: a 6-bit code has its
low 4 bits in the first plane and its high 2 in the second. In a plane of b bits, byte j of a row holds the codes
8j/b, 8j/b + 1, ... of that row from its lowest bit up. The planes of a row lie one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Bits of each plane of a code, lowest plane first."""


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of a packed row."""
    return columns * bits // 8


def fits(columns: int, bits: int) -> bool:
    """Do rows of so many codes fill whole bytes in every plane?"""
    return all(columns * plane % 8 == 0 for plane in PLANES[bits])


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes, uint8 [rows, columns] below 2**bits, into uint8 [rows, columns * bits / 8]."""
    if not fits(codes.shape[1], bits):
        raise ValueError(f"{codes.shape[1]} codes of {bits} bits do not fill whole bytes.")
    parts = [_pack_plane(codes >> shift & (1 << plane) - 1, plane) for plane, shift in _shifts(bits)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The codes, uint8 [rows, columns]; the inverse of `pack`."""
    found: torch.Tensor | None = None
    start = 0
    for plane, shift in _shifts(bits):
        end = start + columns * plane // 8
        part = _unpack_plane(packed[:, start:end], plane)
        found = part if found is None else found | part << shift
        start = end
    assert found is not None
    return found


def _shifts(bits: int) -> Iterator[tuple[int, int]]:
    shift = 0
    for plane in PLANES[bits]:
        yield plane, shift
        shift += plane


def _pack_plane(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes.to(torch.uint8)
    parts = codes.to(torch.uint8).reshape(codes.shape[0], -1, 8 // bits)
    packed = parts[..., 0].clone()
    for place in range(1, 8 // bits):
        packed |= parts[..., place] << bits * place
    return packed


def _unpack_plane(packed: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return packed
    parts = [packed >> bits * place & (1 << bits) - 1 for place in range(8 // bits)]
    return torch.stack(parts, -1).reshape(packed.shape[0], -1)
