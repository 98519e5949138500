"""The simple types with scales that heed how much each number matters, as llama.cpp has it with an importance matrix.

Each function takes blocks of numbers and their weights in the error, float32 [n, 32], and the fields that the plain
rounding makes of them, which stay where nothing better is found.
"""

from __future__ import annotations

import torch

from hasten.formats.gguf import search
from hasten.formats.gguf.blocks import Blocks

STEPS = tuple(step / 5 for step in range(-5, 8))


def weighted_around_zero(values: torch.Tensor, weights: torch.Tensor, plain: Blocks, bits: int) -> Blocks:
    """Q4_0 and Q5_0: the scale of the least weighted squares."""
    half = 1 << bits - 1
    scale = search.symmetric(values, weights, half).half()
    codes = _nearest(values, scale.float(), -half, half - 1)
    found = Blocks((codes + half).to(torch.uint8), scale)
    return _better(found, plain, values, weights, half)


def weighted_from_minimum(values: torch.Tensor, weights: torch.Tensor, plain: Blocks, bits: int) -> Blocks:
    """Q4_1 and Q5_1: the scale and the minimum of the least weighted squares."""
    top = (1 << bits) - 1
    scale, minimum = (item.half() for item in search.affine(values, weights, top, STEPS))
    codes = _nearest(values + minimum.float(), scale.float(), 0, top)
    found = Blocks(codes.to(torch.uint8), scale, minimum=minimum)
    return _better(found, plain, values, weights, 0)


def _nearest(values: torch.Tensor, scale: torch.Tensor, least: int, greatest: int) -> torch.Tensor:
    return (values * torch.where(scale == 0, 0, 1 / scale)).round_().clamp_(least, greatest)


def _better(found: Blocks, plain: Blocks, values: torch.Tensor, weights: torch.Tensor, zero: int) -> Blocks:
    """Block by block the one whose weighted error is less."""
    chosen = _error(found, values, weights, zero) < _error(plain, values, weights, zero)
    minimum = None
    if found.minimum is not None and plain.minimum is not None:
        minimum = torch.where(chosen, found.minimum, plain.minimum)
    codes, scale = torch.where(chosen, found.codes, plain.codes), torch.where(chosen, found.scale, plain.scale)
    return Blocks(codes, scale, minimum=minimum)


def _error(blocks: Blocks, values: torch.Tensor, weights: torch.Tensor, zero: int) -> torch.Tensor:
    """The weighted sum of squares that is left, [n, 1]."""
    levels = (blocks.codes.float() - zero) * blocks.scale.float()
    if blocks.minimum is not None:
        levels -= blocks.minimum.float()
    return (levels - values).square_().mul_(weights).sum(1, keepdim=True)
