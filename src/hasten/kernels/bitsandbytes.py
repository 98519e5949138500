"""The number systems of bitsandbytes, made and read without the library: the same codes and scales to the last bit.

4 bits: QLoRA, https://arxiv.org/abs/2305.14314. 8 bits: LLM.int8(), https://arxiv.org/abs/2208.07339. The 8-bit
numbers that code the scales of 4-bit weights: https://arxiv.org/abs/1511.04561.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch

from hasten.core.errors import HastenError
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.packing import pack
from hasten.kernels.rounding import as_matrix, check_finite
from hasten.kernels.weight import QuantizedWeight, Scales

Kind = Literal["nf4", "fp4"]
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

BLOCK, NESTED_BLOCK = 64, 256
"""Numbers that share a scale, and scales that share a scale of their own."""


@functools.cache
def table(kind: Kind) -> torch.Tensor:
    """What the 16 codes stand for, float32 [16]: quantiles of the normal distribution, or 4-bit floats over 12."""
    if kind == "nf4":
        return torch.tensor(_NF4)
    return torch.tensor([*_FP4, *(-value for value in _FP4)]) / 12.0


@functools.cache
def dynamic_map() -> torch.Tensor:
    """What the 256 codes of scales stand for, float32 [256], ascending: seven decades, finer towards 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = (10 ** (decade - 6)) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_4bit(
    weight: torch.Tensor, kind: Kind = "nf4", *, block: int = BLOCK, double: bool = True
) -> QuantizedWeight:
    """Round to the nearest of 16 numbers times the greatest magnitude of the block, as `quantize_4bit` of the library.

    Blocks run over the weight row by row. With `double`, scales less their mean are coded with 8 bits.

    Raises:
        HastenError: the weight is not finite, or holds an odd number of elements.
    """
    flat = as_matrix(weight).reshape(-1)
    blocks = _blocks(flat, block)
    absmax = blocks.abs().amax(1)
    codes = nearest(_normalized(blocks, absmax, flat.numel()), table(kind)).reshape(-1)[: flat.numel()]
    scales = nested(absmax) if double else Scales(absmax.unsqueeze(0))
    return four_bit(weight.shape, codes, scales, kind, block)


def _normalized(blocks: torch.Tensor, absmax: torch.Tensor, count: int) -> torch.Tensor:
    """Numbers over the greatest magnitude of their block, of which the last may hold fewer than the others."""
    # Times the reciprocal for whole blocks and a division for a cut one, as in the library: the last bit differs.
    found = blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)
    if count % blocks.shape[1]:
        found[-1] = blocks[-1] / absmax[-1].clamp(min=1e-38)
    return found.clamp(-1, 1)


def _blocks(flat: torch.Tensor, block: int) -> torch.Tensor:
    """[blocks, block], the last one filled up with zeros."""
    rest = -flat.numel() % block
    return torch.nn.functional.pad(flat, (0, rest)).reshape(-1, block)


def nested(absmax: torch.Tensor) -> Scales:
    """Code scales, float32 [blocks], with 8 bits: one row, whose `coarse` holds a number for each 256."""
    offset = absmax.mean()
    codes, coarse = quantize_dynamic(absmax - offset)
    return Scales(codes.unsqueeze(0), coarse.unsqueeze(0), dynamic_map().to(absmax.device, copy=True), offset)


def quantize_dynamic(values: torch.Tensor, block: int = NESTED_BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Code numbers, float32 [n], by the nearest entry of the dynamic map times the greatest magnitude of the block.

    As the library's reference and its GPU kernels do; its kernel for CPUs looks numbers up in a coarser table, and is
    off by one code in about one case of 700.
    """
    blocks = _blocks(values, block)
    absmax = blocks.abs().amax(1)
    return nearest(_normalized(blocks, absmax, values.numel()), dynamic_map()).reshape(-1)[: values.numel()], absmax


def nearest(normal: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """The code of the entry that is nearest to each number from -1 to 1, uint8; the lower one of two as near."""
    ordered, order = entries.to(normal.device).sort()
    places = torch.bucketize(normal, (ordered[:-1] + ordered[1:]) / 2)
    return order[places].to(torch.uint8)


def four_bit(
    shape: tuple[int, ...] | torch.Size, codes: torch.Tensor, scales: Scales, kind: Kind, block: int = BLOCK
) -> QuantizedWeight:
    """Put a weight together from flat codes, uint8 [elements], and scales as one row, [1, blocks].

    The grid is the weight's own where blocks (and the blocks of coded scales) end with its rows; otherwise rows are
    as long as both divide into. Blocks that were cut short at the end of the weight repeat their scale.
    """
    count = codes.numel()
    if count % 2:
        raise HastenError(f"a weight of {count} elements does not fill whole bytes with codes of 4 bits.")
    unit = math.gcd(count, block)
    flat = scales.codes.reshape(-1).repeat_interleave(block // unit)[: count // unit]
    columns = _columns(shape, count, unit, None if scales.coarse is None else NESTED_BLOCK * (block // unit))
    coarse = None
    if scales.coarse is not None:
        every = scales.coarse.reshape(-1).repeat_interleave(NESTED_BLOCK * (block // unit))[: flat.numel()]
        coarse = every.reshape(-1, columns // unit)[:, :1].contiguous()
    kept = Scales(flat.reshape(-1, columns // unit), coarse, scales.table, scales.offset)
    packed = pack(codes.reshape(-1, columns), 4)
    entries = table(kind).to(codes.device, copy=True)
    return QuantizedWeight(tuple(shape), NUMBERS["table4"], columns, packed, kept, table=entries)


def _columns(shape: tuple[int, ...] | torch.Size, count: int, unit: int, nested_units: int | None) -> int:
    """Columns of the grid: groups of `unit` divide them, and coarse scales change at their ends alone."""
    inputs = count // shape[0]
    if nested_units is None:
        return inputs if inputs % unit == 0 and inputs % 2 == 0 else unit * math.gcd(count // unit, 2)
    return unit * math.gcd(count // unit, nested_units)


def flat_scales(weight: QuantizedWeight, block: int = BLOCK) -> Scales:
    """The scales as the library has them, the inverse of what `four_bit` does: [1, blocks] and [1, their blocks]."""
    unit = weight.columns // weight.scale.codes.shape[1]
    codes = weight.scale.codes.reshape(-1)[:: block // unit]
    coarse = weight.scale.coarse
    if coarse is not None:
        every = coarse.expand(-1, weight.columns // unit).reshape(-1)
        coarse = every[:: NESTED_BLOCK * (block // unit)].unsqueeze(0)
    return Scales(codes.unsqueeze(0), coarse, weight.scale.table, weight.scale.offset)


def quantize_8bit(weight: torch.Tensor) -> QuantizedWeight:
    """Round rows to -127..127, as `int8_vectorwise_quant` of the library, which reads the weight as float16.

    The scale's codes are the greatest magnitudes of the rows ("SCB"), its coarse scale is 1/127.
    """
    matrix = as_matrix(weight).half().float()
    check_finite(matrix, "the weight holds numbers beyond float16, which LLM.int8() is made of")
    absmax = matrix.abs().amax(1, keepdim=True)
    codes = (matrix * (127.0 / torch.where(absmax > 0, absmax, 1.0))).round().to(torch.int8)
    return eight_bit(weight.shape, codes, absmax)


def eight_bit(shape: tuple[int, ...] | torch.Size, codes: torch.Tensor, absmax: torch.Tensor) -> QuantizedWeight:
    """Put a weight together from codes, int8 [outputs, inputs], and magnitudes of rows, float32 [outputs, 1]."""
    scale = Scales(absmax, torch.full((1, 1), 1 / 127, device=codes.device))
    return QuantizedWeight(tuple(shape), NUMBERS["int8"], codes.shape[1], codes, scale)
