"""Starts the kernels in Triton: arguments from tensors, grids from sizes."""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from hasten.kernels.call import Product
from hasten.kernels.hadamard import hadamard
from hasten.kernels.rounding import FLOAT8
from hasten.kernels.triton import products, rows
from hasten.kernels.weight import QuantizedWeight, Scales

_SMALLEST = 16
"""Rows and columns of the smallest matrices that tensor cores multiply."""


@dataclass(frozen=True)
class Tile:
    """The part of the output that a program computes, and how it is pipelined."""

    tokens: int
    outputs: int
    warps: int
    stages: int


def step(product: Product, largest: int = 128, smallest: int = _SMALLEST) -> int | None:
    """How many columns are taken at a time: a divisor of the inputs that agrees with the groups; None if none does."""
    inputs, group = product.x.shape[1], product.group
    found = largest
    while found >= smallest:
        if inputs % found == 0 and (group % found == 0 or (found % group == 0 and group & (group - 1) == 0)):
            return found
        found //= 2
    return None


def round_tokens(product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth, rotate and round: codes, int8 or e4m3 [tokens, inputs], and scales, float32 [tokens]."""
    x, eight = product.x.contiguous(), product.activations == "float8"
    tokens, inputs = x.shape
    codes = torch.empty_like(x, dtype=torch.float8_e4m3fn if eight else torch.int8)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    given = product.input_scale if eight else None
    facts = {"FLOAT": eight, "LARGEST": FLOAT8["float8_e4m3fn"] if eight else 127.0}
    if product.rotation == 1:
        width = triton.next_power_of_2(inputs)
        warps = min(16, max(1, width // 512))
        rows.round_rows[(tokens,)](
            x, product.smooth, given, codes, scales, inputs, **facts, WIDTH=width, num_warps=warps
        )
        return codes, scales
    matrix = hadamard(product.rotation, device=x.device, dtype=x.dtype)
    grid = (triton.cdiv(tokens, _SMALLEST),)
    rows.rotate_round_rows[grid](
        x, product.smooth, matrix, given, codes, scales, tokens, inputs, **facts,
        GROUP=product.rotation, PART=min(64, product.rotation), TOKENS=_SMALLEST, num_warps=4,
    )  # fmt: skip
    return codes, scales


def widened_weight(product: Product, dtype: torch.dtype) -> torch.Tensor:
    """All values of the weight, [outputs, inputs], in one pass."""
    _, outputs, inputs = product.sizes
    found = torch.empty(outputs, inputs, dtype=dtype, device=product.x.device)
    width = _step(product)
    grid = (triton.cdiv(outputs, 32), inputs // width)
    products.widen_weight[grid](
        *_weight(product.weight), found, outputs, inputs, *_groups(product.weight), **_codes(product),
        UNIT=product.group, BN=32, BK=width,
    )  # fmt: skip
    return found


def widening(product: Product, x: torch.Tensor, scales: torch.Tensor | None, how: Tile) -> torch.Tensor:
    """The product with codes widened on the way, of prepared inputs, or of 8-bit ones and their scales."""
    out, ends, side = _ends(product, scales)
    products.widening_product[_grid(product, how)](
        x.contiguous(), *ends, out, *_weight(product.weight), *product.sizes, *side, *_groups(product.weight),
        **_codes(product), UNIT=product.group, BK=_step(product), **_tile(how, side),
    )  # fmt: skip
    return out


def by_rows(product: Product, x: torch.Tensor, scales: torch.Tensor, how: Tile) -> torch.Tensor:
    """8-bit codes times 8-bit codes with scales of rows on both sides."""
    weight, (out, ends, side) = product.weight, _ends(product, scales)
    scale = weight.scale.values()
    inner = next(size for size in (128, 64, 32) if product.x.shape[1] % size == 0)
    products.rows_product[_grid(product, how)](
        x, *ends, out, weight.codes.contiguous(), scale, *product.sizes, *side, int(scale.shape[0] > 1),
        SUM=_sum(x), BK=inner, **_tile(how, side),
    )  # fmt: skip
    return out


def by_groups(product: Product, x: torch.Tensor, scales: torch.Tensor, how: Tile) -> torch.Tensor:
    """8-bit tokens times whole numbers (or 8-bit floats) with scales of groups."""
    out, ends, side = _ends(product, scales)
    inner = next(size for size in (128, 64, 32) if math.gcd(product.group, product.x.shape[1]) % size == 0)
    products.grouped_product[_grid(product, how)](
        x, *ends, out, *_weight(product.weight), *product.sizes, *side, *_groups(product.weight),
        **_codes(product), SUM=_sum(x), BK=inner, **_tile(how, side),
    )  # fmt: skip
    return out


def _step(product: Product) -> int:
    found = step(product)
    assert found is not None
    return found


def _sum(x: torch.Tensor) -> Any:
    return tl.int32 if x.dtype == torch.int8 else tl.float32


def _grid(product: Product, how: Tile) -> tuple[int]:
    tokens, outputs, _ = product.sizes
    return (triton.cdiv(tokens, how.tokens) * triton.cdiv(outputs, how.outputs),)


def _tile(how: Tile, side: tuple[int]) -> dict[str, int]:
    ranks = min(64, max(_SMALLEST, triton.next_power_of_2(side[0])))
    return {"BM": how.tokens, "BN": how.outputs, "RANKS": ranks, "num_warps": how.warps, "num_stages": how.stages}


def _ends(product: Product, scales: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor | None], tuple[int]]:
    """The output, what is done to it at the end, and the ranks of the side branch."""
    tokens, outputs, _ = product.sizes
    out = torch.empty(tokens, outputs, dtype=product.x.dtype, device=product.x.device)
    bias = None if product.bias is None else product.bias.contiguous()
    if product.down is None or product.up is None:
        return out, [scales, bias, None, None], (0,)
    up = product.up.to(product.x.dtype).contiguous()
    return out, [scales, bias, product.ranks().contiguous(), up], (up.shape[1],)


def _codes(product: Product) -> dict[str, int]:
    return {"BITS": product.weight.number.bits, "SHIFT": product.weight.number.shift}


def _weight(weight: QuantizedWeight) -> list[torch.Tensor | None]:
    zero = None if weight.zero is None else _readable(weight.zero)
    table = None if weight.table is None else weight.table.float()
    return [weight.codes.contiguous(), table, *_scales(weight.scale), *_scales(weight.minimum), zero]


def _scales(scales: Scales | None) -> list[torch.Tensor | None]:
    if scales is None:
        return [None] * 4
    coarse = None if scales.coarse is None else _readable(scales.coarse)
    return [_readable(scales.codes), coarse, scales.table, scales.offset]


def _readable(values: torch.Tensor) -> torch.Tensor:
    """Scales of 8-bit floats as float32: not every GPU reads all of their types."""
    small = values.is_floating_point() and values.element_size() == 1
    return (values.float() if small else values).contiguous()


def _groups(weight: QuantizedWeight) -> list[int]:
    scale, minimum = weight.scale, weight.minimum
    found = [scale.codes, scale.coarse, minimum and minimum.codes, minimum and minimum.coarse, weight.zero]
    return [number for values in found for number in _strides(values, weight.columns)]


def _strides(values: torch.Tensor | None, columns: int) -> tuple[int, int]:
    """Distance of rows (0 where all share one) and columns that share a number."""
    if values is None:
        return 0, 1
    return (values.shape[1] if values.shape[0] > 1 else 0), columns // values.shape[1]
