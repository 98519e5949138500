"""ggml's types of one to three bits, whose codes are entries of codebooks: read alone.

An entry gives the magnitudes of 4 or 8 numbers at once, and signs lie apart. Each number takes one of 6, 8 or 16 values
before it is scaled, so that the codes become a table of these, without loss. Source: ggml-common.h and ggml-quants.c
of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

import base64
import functools
import json
from importlib import resources
from typing import Any

import torch

from hasten.formats.gguf.bits import cut, half, spread_bits
from hasten.formats.gguf.blocks import Blocks

IQ2_LEVELS, IQ3_XXS_LEVELS = (8, 25, 43, 0), (4, 12, 20, 28, 36, 44, 52, 62)
IQ3_S_LEVELS = (1, 3, 5, 7, 9, 11, 13, 15)
IQ1_DELTA = 0.125


@functools.cache
def book(name: str) -> torch.Tensor:
    """A codebook, uint8 [entries, 4 or 8]: for each number of an entry the index of its level."""
    found: dict[str, Any] = json.loads(
        resources.files("hasten.formats.gguf").joinpath("codebooks.json").read_text("utf-8")
    )
    entry = found["books"][name]
    data = torch.tensor(list(base64.b64decode(entry["data"])), dtype=torch.uint8)
    return spread_bits(data[None], 1, entry["bits"]).reshape(-1, entry["width"])


def signed_table(levels: tuple[int, ...]) -> torch.Tensor:
    """What codes stand for whose highest bit is the sign."""
    return torch.tensor([*levels, *(-level for level in levels)], dtype=torch.float32)


def shifted_table() -> torch.Tensor:
    """What IQ1's codes stand for: -1, 0 or 1, moved up or (highest bit) down by an eighth."""
    up, down = [[level + delta for level in (-1, 0, 1)] for delta in (IQ1_DELTA, -IQ1_DELTA)]
    return torch.tensor([*up, 0.0, *down, 0.0])


def read_iq2_xxs(data: torch.Tensor) -> Blocks:
    """d 2, then for 32 numbers each 4 entries of 1 byte and 4 with 4 x 7 signs and a scale of 4 bits."""
    d, rest = cut(data, 2, 64)
    parts = rest.reshape(len(data), 8, 8)
    words = _words(parts[..., 4:])
    return Blocks(_signed("IQ2_XXS", parts[..., :4], _seven(words), 2), _top(words), half(d))


def read_iq2_xs(data: torch.Tensor) -> Blocks:
    """d 2, 32 words of 2 with 9 bits of an entry and 7 signs, nibbles of scales 8."""
    d, entries, scales = cut(data, 2, 64, 8)
    words = _words(entries.reshape(len(data), 32, 2))
    signs = _parity(words >> 9)
    return Blocks(_signed("IQ2_XS", words & 511, signs, 2), spread_bits(scales, 1, 4), half(d))


def read_iq2_s(data: torch.Tensor) -> Blocks:
    """d 2, low bytes of entries 32, signs 32, high pairs of bits of entries 8, nibbles of scales 8."""
    d, low, signs, high, scales = cut(data, 2, 32, 32, 8, 8)
    entries = low.int() | spread_bits(high, 1, 2).int() << 8
    return Blocks(_signed("IQ2_S", entries, spread_bits(signs, 1, 1), 2), spread_bits(scales, 1, 4), half(d))


def read_iq3_xxs(data: torch.Tensor) -> Blocks:
    """d 2, entries 64 (for 4 numbers each), then 8 words of 4 with 4 x 7 signs and a scale of 4 bits."""
    d, entries, rest = cut(data, 2, 64, 32)
    words = _words(rest.reshape(len(data), 8, 4))
    return Blocks(_signed("IQ3_XXS", entries, _seven(words), 3), _top(words), half(d))


def read_iq3_s(data: torch.Tensor) -> Blocks:
    """d 2, low bytes of entries 64, their ninth bits 8, signs 32, nibbles of scales 4."""
    d, low, high, signs, scales = cut(data, 2, 64, 8, 32, 4)
    entries = low.int() | spread_bits(high, 1, 1).int() << 8
    return Blocks(_signed("IQ3_S", entries, spread_bits(signs, 1, 1), 3), spread_bits(scales, 1, 4), half(d))


def read_iq1_s(data: torch.Tensor) -> Blocks:
    """d 2, low bytes of entries 32, 8 words of 2: 4 x 3 high bits of entries, a scale of 3 bits, the shift's sign."""
    d, low, rest = cut(data, 2, 32, 16)
    words = _words(rest.reshape(len(data), 8, 2))
    high = (words[..., None] >> _steps(data, 0, 3, 6, 9)) & 7
    down = (words >> 15).repeat_interleave(4, 1)
    return Blocks(_shifted(low, high, down), (words >> 12 & 7).to(torch.uint8), half(d))


def read_iq1_m(data: torch.Tensor) -> Blocks:
    """Low bytes of entries 32, nibbles 16 (3 high bits and the shift's sign), 4 words of 2 with 4 x 3 bits of scales.

    The highest nibbles of the four words are d.
    """
    low, nibbles, rest = cut(data, 32, 16, 8)
    words = _words(rest.reshape(len(data), 4, 2))
    d = (words >> 12 << _steps(data, 0, 4, 8, 12)).sum(1, keepdim=True)
    high = spread_bits(nibbles, 1, 4)
    scales = (words[..., None] >> _steps(data, 0, 3, 6, 9)) & 7
    bits = d.to(torch.int32).contiguous().view(torch.int16)[:, :1]
    codes = _shifted(low, high & 7, high >> 3)
    return Blocks(codes, scales.reshape(len(data), -1).to(torch.uint8), bits.contiguous().view(torch.float16))


def _signed(name: str, entries: torch.Tensor, signs: torch.Tensor, bits: int) -> torch.Tensor:
    levels = book(name).to(entries.device)[entries.reshape(len(entries), -1).int()].reshape(len(entries), -1)
    return levels | signs.reshape(levels.shape).to(torch.uint8) << bits


def _shifted(low: torch.Tensor, high: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    entries = low.int() | high.reshape(low.shape).int() << 8
    levels = book("IQ1_S").to(low.device)[entries]
    return (levels | (down.to(torch.uint8) << 2)[..., None]).reshape(len(low), -1)


def _words(data: torch.Tensor) -> torch.Tensor:
    """Little-endian words without sign, [..., 2 or 4] bytes to [...] int64."""
    return (data.long() << torch.arange(0, 8 * data.shape[-1], 8, device=data.device)).sum(-1)


def _top(words: torch.Tensor) -> torch.Tensor:
    return (words >> 28).to(torch.uint8)


def _seven(words: torch.Tensor) -> torch.Tensor:
    return _parity((words[..., None] >> _steps(words, 0, 7, 14, 21)) & 127)


def _parity(signs: torch.Tensor) -> torch.Tensor:
    """Eight signs out of seven: the last makes their number even."""
    seven = (signs[..., None] >> torch.arange(7, device=signs.device)) & 1
    return torch.cat([seven, seven.sum(-1, keepdim=True) & 1], -1)


def _steps(like: torch.Tensor, *steps: int) -> torch.Tensor:
    return torch.tensor(steps, device=like.device)
