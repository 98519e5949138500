"""Starts the kernels in Triton: arguments from tensors, grids from sizes."""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from hasten.kernels.call import Product, row_scales
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.rounding import FLOAT8
from hasten.kernels.triton import gemv, products, rows
from hasten.kernels.triton.tools import traced
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
    width = triton.next_power_of_2(inputs)
    traced(rows.round_rows)[(tokens,)](
        x, product.smooth, given, codes, scales, inputs, **_eight(eight), ORDER=product.rotation.bit_length() - 1,
        WIDTH=width, num_warps=min(16, max(1, width // 512)),
    )  # fmt: skip
    return codes, scales


def widened_weight(product: Product, dtype: torch.dtype) -> torch.Tensor:
    """All values of the weight, [outputs, inputs], in one pass."""
    _, outputs, inputs = product.sizes
    found = torch.empty(outputs, inputs, dtype=dtype, device=product.x.device)
    width = _step(product)
    grid = (triton.cdiv(outputs, 32), inputs // width)
    traced(products.widen_weight)[grid](
        *_weight(product.weight), found, outputs, inputs, *_groups(product.weight), **_codes(product),
        UNIT=product.group, BN=32, BK=width,
    )  # fmt: skip
    return found


def recoded(product: Product) -> Product:
    """The product with the weight rounded once more, to 8 bits with a scale for each row: as its activations are.

    The scale makes the largest magnitude of a row 127, or 448 with 8-bit floats. So integers move a weight by at most
    half of 1/127 of the largest in its row, floats by at most 1/16 of itself (tiny ones by 2.2e-6 of the largest).
    Whole numbers of a row that have one scale stay what they are.

    Of 3072 normal numbers a row, products err by 0.8 % more with integers and by 2.6 % with floats, which is as much
    as rounding the tokens costs; with one weight of 20 standard deviations in each row, by 4 % and 2.4 %.
    """
    weight, (_, outputs, inputs), device = product.weight, product.sizes, product.x.device
    eight = product.activations == "float8"
    number = NUMBERS["float8_e4m3fn" if eight else "int8"]
    given = row_scales(weight) if product.by_row and weight.number.kind == "integer" and not eight else None
    codes = torch.empty(outputs, inputs, dtype=number.dtype, device=device)
    scales = torch.empty(outputs, dtype=torch.float32, device=device)
    width = _step(product, 1024)
    down = max(1, 4096 // width)
    traced(products.recode_rows)[triton.cdiv(outputs, down),](
        *_weight(weight), given, codes, scales, outputs, inputs, *_groups(weight), **_codes(product),
        UNIT=product.group, **_eight(eight), BN=down, BK=width, num_warps=4,
    )  # fmt: skip
    made = QuantizedWeight(weight.shape, number, inputs, codes, Scales(scales[:, None]))
    return replace(product, weight=made)


def few_tokens(product: Product) -> torch.Tensor:
    """The product of up to four tokens, which are not rounded, with a weight of 4 or 8 bits."""
    out, (_, *ends), side = _ends(product, None)
    tokens, outputs, inputs = product.sizes
    bits, x = product.weight.number.bits, product.prepared().contiguous()
    # Pairs of inputs are read as words, which begin at even places.
    x = x.clone() if x.storage_offset() % 2 else x
    width = min(inputs & -inputs, 4096 // bits)
    down, steps, count = 16384 // (bits * width), inputs // width, triton.next_power_of_2(tokens)
    # Loads that are under way at once: more tokens, and two codes a byte, leave fewer registers for them.
    most = min(6 * bits // 8, 6 // count)
    traced(gemv.few_tokens_product)[triton.cdiv(outputs, down),](
        x.view(torch.int32) if bits == 4 else x, *ends, out, *_weight(product.weight), *product.sizes, *side,
        *_groups(product.weight), **_codes(product), PIECE=piece(product), TOKENS=count,
        BN=down, BK=width, UNROLL=next(parts for parts in range(most, 0, -1) if steps % parts == 0),
        RANKS=min(64, triton.next_power_of_2(side[0] or 1)), num_warps=4,
    )  # fmt: skip
    return out


def piece(product: Product) -> int:
    """How many codes a thread adds up before it scales them: those of 16 bytes, or fewer in a smaller group."""
    group = math.gcd(product.group, product.x.shape[1])
    return min(128 // product.weight.number.bits, group & -group)


def widening(product: Product, x: torch.Tensor, scales: torch.Tensor | None, how: Tile) -> torch.Tensor:
    """The product with codes widened on the way, of prepared inputs, or of 8-bit ones and their scales."""
    out, ends, side = _ends(product, scales)
    if product.weight.table is not None or product.weight.scale.table is not None:
        # In a pipelined loop Triton copies entries of tables to shared memory one by one: ten times as slow.
        how = replace(how, stages=1)
    traced(products.widening_product)[_grid(product, how)](
        x.contiguous(), *ends, out, *_weight(product.weight), *product.sizes, *side, *_groups(product.weight),
        **_codes(product), UNIT=product.group, BK=_step(product), **_tile(how),
    )  # fmt: skip
    return out


def by_rows(product: Product, x: torch.Tensor, scales: torch.Tensor, how: Tile) -> torch.Tensor:
    """8-bit codes times 8-bit codes with scales of rows on both sides."""
    weight, (out, ends, side) = product.weight, _ends(product, scales)
    scale = weight.scale.values()
    inner = next(size for size in (128, 64, 32) if product.x.shape[1] % size == 0)
    traced(products.rows_product)[_grid(product, how)](
        x, *ends, out, weight.codes.contiguous(), scale, *product.sizes, *side, int(scale.shape[0] > 1),
        WHOLE=x.dtype == torch.int8, BK=inner, **_tile(how),
    )  # fmt: skip
    return out


def by_groups(product: Product, x: torch.Tensor, scales: torch.Tensor, how: Tile) -> torch.Tensor:
    """8-bit tokens times whole numbers (or 8-bit floats) with scales of groups."""
    out, ends, side = _ends(product, scales)
    inner = next(size for size in (128, 64, 32) if math.gcd(product.group, product.x.shape[1]) % size == 0)
    traced(products.grouped_product)[_grid(product, how)](
        x, *ends, out, *_weight(product.weight), *product.sizes, *side, *_groups(product.weight),
        **_codes(product), WHOLE=x.dtype == torch.int8, BK=inner, **_tile(how),
    )  # fmt: skip
    return out


def _eight(floats: bool) -> dict[str, Any]:
    """The constants that say what 8 bits are rounded to."""
    return {"FLOAT": floats, "LARGEST": FLOAT8["float8_e4m3fn"] if floats else 127.0}


def _step(product: Product, largest: int = 128) -> int:
    found = step(product, largest)
    assert found is not None
    return found


def _grid(product: Product, how: Tile) -> tuple[int]:
    tokens, outputs, _ = product.sizes
    return (triton.cdiv(tokens, how.tokens) * triton.cdiv(outputs, how.outputs),)


def _tile(how: Tile) -> dict[str, int]:
    # More ranks at a time take registers: with 32, an SM of an H100 holds one tile of 128x128 instead of two.
    return {"BM": how.tokens, "BN": how.outputs, "RANKS": _SMALLEST, "num_warps": how.warps, "num_stages": how.stages}


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
