"""The byte layouts of ggml's block types that can be read and written.

Source: ggml-common.h and ggml-quants.c of https://github.com/ggml-org/ggml. Sizes are in bytes, and a layout is given
as its fields in their order.
"""

from __future__ import annotations

import torch

from hasten.formats.gguf.bits import cut, gather_bits, half, negated, raw, spread_bits
from hasten.formats.gguf.blocks import Blocks


def read_q4_0(data: torch.Tensor) -> Blocks:
    """d 2, nibbles 16: d * (q - 8). IQ4_NL has the same layout, with a table."""
    d, low = cut(data, 2, 16)
    return Blocks(spread_bits(low, 16, 4), half(d))


def write_q4_0(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q4_0`."""
    return torch.cat([raw(blocks.scale), gather_bits(blocks.codes, 16, 4)], 1)


def read_q4_1(data: torch.Tensor) -> Blocks:
    """d 2, m 2, nibbles 16: d * q + m."""
    d, m, low = cut(data, 2, 2, 16)
    return Blocks(spread_bits(low, 16, 4), half(d), minimum=negated(half(m)))


def write_q4_1(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q4_1`."""
    assert blocks.minimum is not None
    return torch.cat([raw(blocks.scale), raw(negated(blocks.minimum)), gather_bits(blocks.codes, 16, 4)], 1)


def read_q5_0(data: torch.Tensor) -> Blocks:
    """d 2, fifth bits 4, nibbles 16: d * (q - 16)."""
    d, high, low = cut(data, 2, 4, 16)
    return Blocks(spread_bits(low, 16, 4) | spread_bits(high, 1, 1) << 4, half(d))


def write_q5_0(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q5_0`."""
    return torch.cat([raw(blocks.scale), *_five_bits(blocks.codes)], 1)


def read_q5_1(data: torch.Tensor) -> Blocks:
    """d 2, m 2, fifth bits 4, nibbles 16: d * q + m."""
    d, m, high, low = cut(data, 2, 2, 4, 16)
    return Blocks(spread_bits(low, 16, 4) | spread_bits(high, 1, 1) << 4, half(d), minimum=negated(half(m)))


def write_q5_1(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q5_1`."""
    assert blocks.minimum is not None
    return torch.cat([raw(blocks.scale), raw(negated(blocks.minimum)), *_five_bits(blocks.codes)], 1)


def read_q8_0(data: torch.Tensor) -> Blocks:
    """d 2, signed bytes 32: d * q."""
    d, codes = cut(data, 2, 32)
    return Blocks(codes.contiguous().view(torch.int8), half(d))


def write_q8_0(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q8_0`."""
    return torch.cat([raw(blocks.scale), raw(blocks.codes)], 1)


def read_q2_k(data: torch.Tensor) -> Blocks:
    """Scale and minimum 16 (a nibble each), pairs of bits 64, d 2, dmin 2: d * s * q - dmin * m."""
    scales, low, d, dmin = cut(data, 16, 64, 2, 2)
    return Blocks(spread_bits(low, 32, 2), scales & 15, half(d), scales >> 4, half(dmin))


def write_q2_k(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q2_k`."""
    minimum, coarse, dmin = _nested(blocks)
    return torch.cat([blocks.scale | minimum << 4, gather_bits(blocks.codes, 32, 2), raw(coarse), raw(dmin)], 1)


def read_q3_k(data: torch.Tensor) -> Blocks:
    """Third bits 32, pairs of bits 64, 6-bit scales 12, d 2: d * (s - 32) * (q - 4)."""
    high, low, scales, d = cut(data, 32, 64, 12, 2)
    codes = spread_bits(low, 32, 2) | spread_bits(high, 32, 1) << 2
    coded = spread_bits(scales[:, :8], 8, 4) | spread_bits(scales[:, 8:], 4, 2) << 4
    return Blocks(codes, coded.to(torch.int8) - 32, half(d))


def write_q3_k(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q3_k`."""
    assert blocks.coarse is not None
    coded = (blocks.scale + 32).to(torch.uint8)
    scales = [gather_bits(coded & 15, 8, 4), gather_bits(coded >> 4, 4, 2)]
    high, low = gather_bits(blocks.codes >> 2, 32, 1), gather_bits(blocks.codes & 3, 32, 2)
    return torch.cat([high, low, *scales, raw(blocks.coarse)], 1)


def read_q4_k(data: torch.Tensor) -> Blocks:
    """d 2, dmin 2, 6-bit scales and minima 12, nibbles 128: d * s * q - dmin * m."""
    d, dmin, scales, low = cut(data, 2, 2, 12, 128)
    scale, minimum = _read_six_bits(scales)
    return Blocks(spread_bits(low, 32, 4), scale, half(d), minimum, half(dmin))


def write_q4_k(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q4_k`."""
    minimum, coarse, dmin = _nested(blocks)
    scales = _write_six_bits(blocks.scale, minimum)
    return torch.cat([raw(coarse), raw(dmin), scales, gather_bits(blocks.codes, 32, 4)], 1)


def read_q5_k(data: torch.Tensor) -> Blocks:
    """d 2, dmin 2, 6-bit scales and minima 12, fifth bits 32, nibbles 128: d * s * q - dmin * m."""
    d, dmin, scales, high, low = cut(data, 2, 2, 12, 32, 128)
    scale, minimum = _read_six_bits(scales)
    codes = spread_bits(low, 32, 4) | spread_bits(high, 32, 1) << 4
    return Blocks(codes, scale, half(d), minimum, half(dmin))


def write_q5_k(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q5_k`."""
    minimum, coarse, dmin = _nested(blocks)
    scales = _write_six_bits(blocks.scale, minimum)
    high, low = gather_bits(blocks.codes >> 4, 32, 1), gather_bits(blocks.codes & 15, 32, 4)
    return torch.cat([raw(coarse), raw(dmin), scales, high, low], 1)


def read_q6_k(data: torch.Tensor) -> Blocks:
    """Nibbles 128, pairs of high bits 64, signed scales 16, d 2: d * s * (q - 32)."""
    low, high, scales, d = cut(data, 128, 64, 16, 2)
    codes = spread_bits(low, 64, 4) | spread_bits(high, 32, 2) << 4
    return Blocks(codes, scales.contiguous().view(torch.int8), half(d))


def write_q6_k(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_q6_k`."""
    assert blocks.coarse is not None
    low, high = gather_bits(blocks.codes & 15, 64, 4), gather_bits(blocks.codes >> 4, 32, 2)
    return torch.cat([low, high, raw(blocks.scale), raw(blocks.coarse)], 1)


def read_iq4_xs(data: torch.Tensor) -> Blocks:
    """d 2, high pairs of scales 2, low nibbles of scales 4, nibbles 128: d * (s - 32) * table[q]."""
    d, high, low, codes = cut(data, 2, 2, 4, 128)
    coded = spread_bits(low, 1, 4) | spread_bits(high, 1, 2) << 4
    return Blocks(spread_bits(codes, 16, 4), coded.to(torch.int8) - 32, half(d))


def write_iq4_xs(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_iq4_xs`."""
    assert blocks.coarse is not None
    coded = (blocks.scale + 32).to(torch.uint8)
    scales = [gather_bits(coded >> 4, 1, 2), gather_bits(coded & 15, 1, 4)]
    return torch.cat([raw(blocks.coarse), *scales, gather_bits(blocks.codes, 16, 4)], 1)


def read_mxfp4(data: torch.Tensor) -> Blocks:
    """Exponent 1, nibbles 16: 2**(e - 128) * table[q]."""
    exponent, codes = cut(data, 1, 16)
    return Blocks(spread_bits(codes, 16, 4), exponent.contiguous())


def write_mxfp4(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_mxfp4`."""
    return torch.cat([blocks.scale, gather_bits(blocks.codes, 16, 4)], 1)


def read_nvfp4(data: torch.Tensor) -> Blocks:
    """Scales without sign in e4m3 4, nibbles 32: scale / 2 * table[q]."""
    scales, codes = cut(data, 4, 32)
    return Blocks(spread_bits(codes, 8, 4), scales.contiguous())


def write_nvfp4(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_nvfp4`."""
    return torch.cat([blocks.scale, gather_bits(blocks.codes, 8, 4)], 1)


def read_tq2_0(data: torch.Tensor) -> Blocks:
    """Pairs of bits 64, d 2: d * (q - 1)."""
    codes, d = cut(data, 64, 2)
    return Blocks(spread_bits(codes, 32, 2), half(d))


def write_tq2_0(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_tq2_0`."""
    return torch.cat([gather_bits(blocks.codes, 32, 2), raw(blocks.scale)], 1)


_TERNARY = ((32, 5), (16, 5), (4, 4))
"""Runs of bytes of TQ1_0, and the digits to base 3 in each of their bytes."""


def read_tq1_0(data: torch.Tensor) -> Blocks:
    """Bytes of five digits to base 3 48, of four 4, d 2: d * table[q]. A byte is its number times 256 / 243."""
    *runs, d = cut(data, 32, 16, 4, 2)
    parts: list[torch.Tensor] = []
    for run, (_, digits) in zip(runs, _TERNARY, strict=True):
        # In bytes, so that the digits before the wanted one overflow away.
        parts += [((run * 3**place).to(torch.int16) * 3 >> 8).to(torch.uint8) for place in range(digits)]
    return Blocks(torch.cat(parts, 1), half(d))


def write_tq1_0(blocks: Blocks) -> torch.Tensor:
    """The inverse of `read_tq1_0`. The fourth code, which stands for 0 as well, becomes the second."""
    codes = torch.where(blocks.codes < 3, blocks.codes, 1).to(torch.int32)
    parts: list[torch.Tensor] = []
    start = 0
    for width, digits in _TERNARY:
        run = codes[:, start : start + width * digits].reshape(-1, digits, width)
        total = torch.stack([run[:, place] * 3 ** (4 - place) for place in range(digits)]).sum(0)
        parts.append(((total * 256 + 242) // 243).to(torch.uint8))
        start += width * digits
    return torch.cat([*parts, raw(blocks.scale)], 1)


def _five_bits(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return gather_bits(codes >> 4, 1, 1), gather_bits(codes & 15, 16, 4)


def _nested(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    assert blocks.minimum is not None
    assert blocks.coarse is not None
    assert blocks.minimum_coarse is not None
    return blocks.minimum, blocks.coarse, blocks.minimum_coarse


def _read_six_bits(data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima: the first four of each have their own bytes, which also hold high bits of the
    others; the low nibbles of these share the last four bytes."""
    scale, minimum, shared = cut(data, 4, 4, 4)
    return (
        torch.cat([scale & 63, shared & 15 | scale >> 2 & 48], 1),
        torch.cat([minimum & 63, shared >> 4 | minimum >> 2 & 48], 1),
    )


def _write_six_bits(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    first, second = [item[:, :4] | (item[:, 4:] >> 4) << 6 for item in (scale, minimum)]
    return torch.cat([first, second, scale[:, 4:] & 15 | (minimum[:, 4:] & 15) << 4], 1)
