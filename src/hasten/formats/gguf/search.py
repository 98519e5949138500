"""The search for the scales of K-quants and of the 4-bit types with a table.

What is sought is the least sum of w * (x - x')**2 over a block, where w is how much a number matters (1, or the mean
square of what it is multiplied with). As in ggml's make_qkx2_quants and make_qx_quants, several roundings of a group
are tried, each with the scale (and minimum) of the least squares for it, and the best is kept. Groups of all blocks
are searched at once.

Source: ggml-quants.c of https://github.com/ggml-org/ggml (the formulas).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

STEPS = tuple(step / 10 for step in range(-9, 10))


def affine(x: torch.Tensor, w: torch.Tensor, top: int, steps: Iterable[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale s >= 0 and minimum m >= 0 of each group, [..., 1], so that s * code - m is near x, codes 0 to `top`."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    span = (high - low).clamp(min=torch.finfo(x.dtype).tiny)
    above, wx = x - low, w * x
    sum_w, sum_x = w.sum(-1, keepdim=True), wx.sum(-1, keepdim=True)
    best_scale, best_minimum = span / top, -low
    best = _left((above * (top / span)).round_().clamp_(0, top), best_scale, best_minimum, x, w)
    for step in steps:
        codes = (above * ((top + step) / span)).round_().clamp_(0, top)
        scale, minimum = _line(codes, w, wx, sum_w, sum_x)
        error = _left(codes, scale, minimum, x, w)
        better = error < best  # False for NaN, where there is nothing to fit.
        best = torch.where(better, error, best)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _left(
    codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, x: torch.Tensor, w: torch.Tensor
) -> torch.Tensor:
    """The sum of weighted squares that is left; `codes` are overwritten.

    Not from the sums of the least squares: where few numbers outweigh all others, rounding errors would be left of it.
    """
    return codes.mul_(scale).sub_(minimum).sub_(x).square_().mul_(w).sum(-1, keepdim=True)


def _line(
    codes: torch.Tensor, w: torch.Tensor, wx: torch.Tensor, sum_w: torch.Tensor, sum_x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The s and m >= 0 of the least weighted squares of s * code - m - x."""
    weighted = w * codes
    sum_l = weighted.sum(-1, keepdim=True)
    sum_ll, sum_xl = weighted.mul_(codes).sum(-1, keepdim=True), (wx * codes).sum(-1, keepdim=True)
    free = sum_w * sum_ll - sum_l * sum_l
    free = torch.where(free > 1e-6 * sum_w * sum_ll, free, torch.nan)  # All codes are the same.
    minimum = (sum_l * sum_xl - sum_ll * sum_x) / free
    scale = (sum_w * sum_xl - sum_x * sum_l) / free
    return torch.where(minimum < 0, sum_xl / sum_ll, scale), minimum.clamp(min=0)


def symmetric(x: torch.Tensor, w: torch.Tensor, half: int, steps: Iterable[float] = STEPS) -> torch.Tensor:
    """The scale of each group, [..., 1] and of either sign, so that s * code is near x, codes -half to half - 1."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    wx = w * x
    best_scale, best = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for step in steps:
        codes = (x * (-(half + step) / extreme)).round_().clamp_(-half, half - 1)
        best_scale, best = _fitted(codes, w, wx, best_scale, best)
    return best_scale


def tabled(x: torch.Tensor, w: torch.Tensor, table: torch.Tensor, tries: int = 7) -> torch.Tensor:
    """The scale of each group, [..., 1] and of either sign, so that s * table[code] is near x."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    wx = w * x
    best_scale, best = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for end in (table[0], -table[0]):
        for step in range(-tries, tries + 1, 2):
            levels = table[nearest(x * ((end + step) / extreme), table)]
            best_scale, best = _fitted(levels, w, wx, best_scale, best)
    return best_scale


def _fitted(
    codes: torch.Tensor, w: torch.Tensor, wx: torch.Tensor, best_scale: torch.Tensor, best: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The better of the best so far and of the least squares for these codes."""
    sum_ll, sum_xl = (w * codes * codes).sum(-1, keepdim=True), (wx * codes).sum(-1, keepdim=True)
    scale = sum_xl / sum_ll
    gain = scale * sum_xl
    better = gain > best  # False for NaN, of groups that are all zero.
    return torch.where(better, scale, best_scale), torch.where(better, gain, best)


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry of an ascending table."""
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)
