"""The orders in which nunchaku lays out what its kernels read: permutations, undone and done exactly.

Weights and scales go tile by tile, 128 outputs high, in the order in which the lanes of a warp load them. Sources: the
Apache-licensed https://github.com/nunchaku-ai/nunchaku and https://github.com/mit-han-lab/deepcompressor.
"""

from __future__ import annotations

import torch

TILE = 128
"""Outputs of a tile; matrices and vectors are padded to multiples of it."""
STEP = 64
"""Inputs of a tile of weights, and of a group of 4-bit integers."""
MICRO = 16
"""Inputs that share a scale of 4-bit floats."""
_INTERLEAVED = 4
"""Rows that AWQ's kernel reads together."""


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """4-bit codes in tiles, int8 [outputs, inputs / 2], as bytes row by row, the even input in the low half."""
    outputs, half = packed.shape
    tiles = packed.view(torch.uint8).reshape(outputs // TILE, 2 * half // STEP, 8, 8, 4, 2, 2, 4)
    return tiles.permute(0, 2, 5, 3, 1, 6, 4, 7).reshape(outputs, half)


def pack_weight(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_weight`."""
    outputs, half = codes.shape
    rows = codes.reshape(outputs // TILE, 8, 2, 8, 2 * half // STEP, 2, 4, 4)
    return rows.permute(0, 4, 1, 3, 6, 2, 5, 7).reshape(outputs, half).view(torch.int8)


def unpack_scales(packed: torch.Tensor) -> torch.Tensor:
    """Scales of groups of 64, [groups, outputs] in the order of lanes, as [outputs, groups]."""
    groups, outputs = packed.shape
    lanes = packed.reshape(outputs // TILE, groups, 8, 4, 2, 2)
    return lanes.permute(0, 2, 4, 3, 5, 1).reshape(outputs, groups)


def pack_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_scales`."""
    outputs, groups = scales.shape
    return scales.reshape(outputs // TILE, 8, 2, 4, 2, groups).permute(0, 5, 1, 3, 2, 4).reshape(groups, outputs)


def unpack_vector(packed: torch.Tensor) -> torch.Tensor:
    """A number for each channel (bias, smoothing, scale of a row): scales with one group."""
    return unpack_scales(packed.reshape(1, -1)).reshape(-1)


def pack_vector(values: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_vector`."""
    return pack_scales(values.reshape(-1, 1)).reshape(-1)


def unpack_micro_scales(packed: torch.Tensor) -> torch.Tensor:
    """e4m3 scales of blocks of 16, [blocks, outputs] in the order of lanes, as [outputs, blocks]."""
    blocks, outputs = packed.shape
    lanes = packed.view(torch.uint8).reshape(outputs // TILE, blocks // 4, 8, 4, 4, 4)
    return lanes.permute(0, 4, 3, 2, 1, 5).reshape(outputs, blocks).view(packed.dtype)


def pack_micro_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_micro_scales`."""
    outputs, blocks = scales.shape
    rows = scales.contiguous().view(torch.uint8).reshape(outputs // TILE, 4, 4, 8, blocks // 4, 4)
    return rows.permute(0, 4, 3, 2, 1, 5).reshape(blocks, outputs).view(scales.dtype)


def unpack_down(packed: torch.Tensor) -> torch.Tensor:
    """The down-projection of the side branch, [inputs, ranks] in tiles of 16 x 16, as [ranks, inputs]."""
    inputs, ranks = packed.shape
    tiles = packed.reshape(inputs // 16, ranks // 16, 8, 4, 2, 2, 2)
    return tiles.permute(1, 4, 2, 0, 5, 3, 6).reshape(ranks, inputs)


def pack_down(down: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_down`."""
    ranks, inputs = down.shape
    return down.reshape(ranks // 16, 2, 8, inputs // 16, 2, 4, 2).permute(3, 0, 2, 5, 1, 4, 6).reshape(inputs, ranks)


def unpack_up(packed: torch.Tensor) -> torch.Tensor:
    """The up-projection, [outputs, ranks] in tiles of 16 x 16, row by row."""
    outputs, ranks = packed.shape
    tiles = packed.reshape(outputs // 16, ranks // 16, 8, 4, 2, 2, 2)
    return tiles.permute(0, 4, 2, 1, 5, 3, 6).reshape(outputs, ranks)


def pack_up(up: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_up`."""
    outputs, ranks = up.shape
    return up.reshape(outputs // 16, 2, 8, ranks // 16, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 6).reshape(outputs, ranks)


def unpack_awq(packed: torch.Tensor) -> torch.Tensor:
    """Codes of AWQ's kernel, int32 [outputs / 4, inputs / 2], as codes 0 to 15, uint8 [outputs, inputs].

    A number of 16 bits holds inputs j, j + 8, j + 16 and j + 24 of 32; four rows alternate every 64 inputs.
    """
    quarter, half = packed.shape
    rows = packed.view(torch.int16).reshape(quarter, 2 * half // 64, _INTERLEAVED, 2, 8).permute(0, 2, 1, 3, 4)
    parts = torch.stack([rows >> 4 * place & 0xF for place in range(4)], -2)
    return parts.reshape(quarter * _INTERLEAVED, 2 * half).to(torch.uint8)


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack_awq`."""
    outputs, inputs = codes.shape
    parts = codes.to(torch.int32).reshape(outputs // _INTERLEAVED, _INTERLEAVED, inputs // 64, 2, 4, 8)
    joined = sum((parts[..., place, :] << 4 * place for place in range(1, 4)), parts[..., 0, :])
    # Into 16 bits by way of two's complement, which a plain cast keeps.
    narrow = joined.to(torch.int16).permute(0, 2, 1, 3, 4).reshape(outputs // _INTERLEAVED, inputs)
    return narrow.contiguous().view(torch.int32)


def deinterleave(rows: torch.Tensor, splits: int) -> torch.Tensor:
    """Rows that alternate between parts, [part 0 row 0, part 1 row 0, ...], part by part."""
    return rows.reshape(-1, splits, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def interleave(rows: torch.Tensor, splits: int) -> torch.Tensor:
    """The inverse of `deinterleave`."""
    return rows.reshape(splits, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
