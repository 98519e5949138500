"""From numbers to the fields of ggml's blocks whose scales are searched for.

Each function takes blocks of numbers and their weights in the error, float32 [n, block], and does all blocks at once.
First groups get their best scales (`search`), then these are rounded to codes; last, codes of scales are moved by one
and the block's own scales fitted once more to all, where that makes the error less. The last part is not in ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch

from hasten.formats.gguf import search
from hasten.formats.gguf.blocks import Blocks

Levels = Callable[[torch.Tensor], torch.Tensor]
"""Rounds numbers to the nearest levels that codes stand for."""


@dataclass(frozen=True)
class Fit:
    """Codes of scales (and minima) of blocks, float [n, groups], and the scales of these, [n, 1]."""

    s: torch.Tensor
    d: torch.Tensor
    m: torch.Tensor
    dmin: torch.Tensor

    def levels(self, x: torch.Tensor, nearest: Levels) -> torch.Tensor:
        """The nearest levels of all numbers."""
        scale, minimum = self._by_number()
        return nearest((x + minimum).mul_(torch.where(scale == 0, 0, 1 / scale)))

    def error(self, x: torch.Tensor, w: torch.Tensor, nearest: Levels) -> torch.Tensor:
        """The sum of squares that is left, [n, groups]."""
        scale, minimum = self._by_number()
        left = self.levels(x, nearest).mul_(scale).sub_(minimum).sub_(x)
        return left.square_().mul_(w).sum(-1)

    def _by_number(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.s * self.d)[..., None], (self.m * self.dmin)[..., None]

    def moved(self, least: int, greatest: int, minima: bool) -> Iterator[Fit]:
        """The fits whose codes of scales differ by one."""
        for up in (-1, 0, 1):
            for down in (-1, 0, 1) if minima else (0,):
                if up or down:
                    m = (self.m + down).clamp(0, greatest) if minima else self.m
                    yield replace(self, s=(self.s + up).clamp(least, greatest), m=m)

    def refitted(self, x: torch.Tensor, w: torch.Tensor, levels: torch.Tensor) -> Fit:
        """With the block's scales that are best for these levels, by least squares."""
        a, b = (levels * self.s[..., None]).flatten(1), self.m[..., None].expand_as(levels).flatten(1)
        x, w = x.flatten(1), w.flatten(1)
        wa, wb = w * a, w * b
        aa, ab, bb = _total(wa * a), _total(wa * b), _total(wb * b)
        ax, bx = _total(wa * x), _total(wb * x)
        free = aa * bb - ab * ab
        d, dmin = (ax * bb - bx * ab) / free, (ax * ab - bx * aa) / free
        alone = ~((free > 0) & (dmin > 0))  # No minima, or none that help.
        d = torch.where(alone, (ax + ab * self.dmin) / aa, d)
        d = torch.where(d.isfinite(), d, self.d)
        return replace(self, d=d.half().float(), dmin=torch.where(alone, self.dmin, dmin).half().float())

    def where(self, chosen: torch.Tensor, other: Fit) -> Fit:
        """That of the other where chosen, [n, 1 or groups]; an [n, 1] choice takes whole blocks."""
        kept = {item.name: getattr(self, item.name) for item in fields(self)}
        given = {item.name: getattr(other, item.name) for item in fields(other)}
        wide = chosen.shape[1] == 1
        names = [name for name, value in kept.items() if wide or value.shape == chosen.shape]
        return replace(self, **{name: torch.where(chosen, given[name], kept[name]) for name in names})


def affine_blocks(
    values: torch.Tensor, weights: torch.Tensor, bits: int, group: int, limit: int, steps: tuple[float, ...]
) -> Blocks:
    """Q2_K, Q4_K and Q5_K: d * s * q - dmin * m with codes s and m from 0 to `limit`."""
    x, w = values.unflatten(1, (-1, group)), weights.unflatten(1, (-1, group))
    top = (1 << bits) - 1
    scale, minimum = search.affine(x, w, top, steps)
    s, d = coded(scale[..., 0], w.sum(-1), 0, limit)
    m, dmin = coded(minimum[..., 0], w.sum(-1), 0, limit)

    def nearest(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.round_().clamp_(0, top)

    fit = improved(Fit(s, d, m, dmin), x, w, nearest, (0, limit, True))
    codes = fit.levels(x, nearest).flatten(1).to(torch.uint8)
    return Blocks(codes, fit.s.to(torch.uint8), fit.d.half(), fit.m.to(torch.uint8), fit.dmin.half())


def symmetric_blocks(values: torch.Tensor, weights: torch.Tensor, bits: int, limit: int) -> Blocks:
    """Q3_K and Q6_K, in groups of 16: d * s * q with codes s from -limit to limit - 1."""
    x, w = values.unflatten(1, (-1, 16)), weights.unflatten(1, (-1, 16))
    half = 1 << bits - 1

    def nearest(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.round_().clamp_(-half, half - 1)

    fit = improved(_without_minima(search.symmetric(x, w, half), w, limit), x, w, nearest, (-limit, limit - 1, False))
    codes = (fit.levels(x, nearest).flatten(1) + half).to(torch.uint8)
    return Blocks(codes, fit.s.to(torch.int8), fit.d.half())


def tabled_blocks(values: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> Blocks:
    """IQ4_XS, in groups of 32: d * s * table[q] with codes s from -32 to 31."""
    x, w = values.unflatten(1, (-1, 32)), weights.unflatten(1, (-1, 32))

    def nearest(numbers: torch.Tensor) -> torch.Tensor:
        return table[search.nearest(numbers, table)]

    fit = improved(_without_minima(search.tabled(x, w, table), w, 32), x, w, nearest, (-32, 31, False))
    codes = search.nearest(fit.levels(x, nearest), table).flatten(1).to(torch.uint8)
    return Blocks(codes, fit.s.to(torch.int8), fit.d.half())


def tabled_groups(values: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> Blocks:
    """IQ4_NL: d * table[q], with a scale of its own for each 32 numbers."""
    scale = search.tabled(values, weights, table).half()
    wide = scale.float()
    codes = search.nearest(values * torch.where(wide == 0, 0, 1 / wide), table)
    return Blocks(codes.to(torch.uint8), scale)


def improved(fit: Fit, x: torch.Tensor, w: torch.Tensor, nearest: Levels, codes: tuple[int, int, bool]) -> Fit:
    """With better codes of scales, group by group, and then better scales of blocks."""
    best, error = fit, fit.error(x, w, nearest)
    for other in fit.moved(*codes):
        now = other.error(x, w, nearest)
        best = best.where(now < error, other)
        error = torch.minimum(now, error)
    again = best.refitted(x, w, best.levels(x, nearest))
    better = _total(again.error(x, w, nearest)) < _total(error)
    return best.where(better, again)


def coded(values: torch.Tensor, weights: torch.Tensor, least: int, greatest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes from `least` to `greatest`, float [n, groups], and their scale, [n, 1], for the scales of groups.

    With negative codes the number of the greatest magnitude becomes about the least code.
    """
    extreme = values.gather(1, values.abs().argmax(1, keepdim=True))
    end = greatest if least == 0 else least
    codes, scale = torch.zeros_like(values), torch.zeros_like(extreme)
    best = torch.zeros_like(extreme)
    for step in range(-4, 5):
        tried = (values * ((end + 0.1 * step) / extreme)).round().clamp(least, greatest)
        product = _total(weights * tried * values)
        fitted = product / _total(weights * tried * tried)
        better = fitted * product > best  # False for NaN, of blocks that are all zero.
        best = torch.where(better, fitted * product, best)
        codes, scale = torch.where(better, tried, codes), torch.where(better, fitted, scale)
    return codes, scale.half().float()


def _without_minima(scale: torch.Tensor, w: torch.Tensor, limit: int) -> Fit:
    s, d = coded(scale[..., 0], w.sum(-1), -limit, limit - 1)
    return Fit(s, d, torch.zeros_like(s), torch.zeros_like(d))


def _total(values: torch.Tensor) -> torch.Tensor:
    return values.sum(1, keepdim=True)
