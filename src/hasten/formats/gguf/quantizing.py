"""Quantizes weights to GGUF's types, and says which type and which grid fit a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch

from hasten.core.errors import HastenError, UnknownName
from hasten.formats.gguf.blocks import Blocks, BlockType, joined
from hasten.formats.gguf.rounding import (
    round_around_zero,
    round_bytes,
    round_from_minimum,
    round_mxfp4,
    round_nvfp4,
    round_ternary,
)
from hasten.formats.gguf.superblocks import affine_blocks, symmetric_blocks, tabled_blocks, tabled_groups
from hasten.formats.gguf.types import BY_NAME, IQ4
from hasten.kernels.weight import QuantizedWeight

Quantizer = Callable[[torch.Tensor, torch.Tensor], Blocks]
"""From numbers and their weights in the error, float32 [n, block], to the fields of n blocks."""


def _steps(first: float, count: int) -> tuple[float, ...]:
    return tuple(first + 0.2 * step for step in range(count))


def _unweighted(function: Callable[[torch.Tensor], Blocks]) -> Quantizer:
    return lambda values, _: function(values)


def _tabled(function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Blocks]) -> Quantizer:
    return lambda values, weights: function(values, weights, IQ4.to(values.device))


QUANTIZERS: Mapping[str, Quantizer] = MappingProxyType({
    "Q4_K": partial(affine_blocks, bits=4, group=32, limit=63, steps=_steps(-1, 13)),
    "Q8_0": _unweighted(round_bytes),
    "Q6_K": partial(symmetric_blocks, bits=6, limit=128),
    "Q5_K": partial(affine_blocks, bits=5, group=32, limit=63, steps=_steps(-1, 13)),
    "Q3_K": partial(symmetric_blocks, bits=3, limit=32),
    "Q2_K": partial(affine_blocks, bits=2, group=16, limit=15, steps=_steps(-0.8, 13)),
    "IQ4_XS": _tabled(tabled_blocks),
    "IQ4_NL": _tabled(tabled_groups),
    "Q5_1": _unweighted(partial(round_from_minimum, bits=5)),
    "Q5_0": _unweighted(partial(round_around_zero, bits=5)),
    "Q4_1": _unweighted(partial(round_from_minimum, bits=4)),
    "Q4_0": _unweighted(partial(round_around_zero, bits=4)),
    "MXFP4": _unweighted(round_mxfp4),
    "NVFP4": _unweighted(round_nvfp4),
    "TQ2_0": _unweighted(round_ternary),
    "TQ1_0": _unweighted(round_ternary),
})  # fmt: skip
"""All types that can be quantized to."""

INSTEAD = {
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "Q3_K": "IQ4_NL",
    "Q2_K": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "NVFP4": "IQ4_NL",
    "TQ2_0": "IQ4_NL",
    "TQ1_0": "IQ4_NL",
}
"""The type with blocks of 32 that a weight gets which larger blocks do not divide, as in llama.cpp."""


def fitting(kind: str, shape: tuple[int, ...]) -> tuple[BlockType, int] | None:
    """The type and the columns of the grid for a weight; None if its numbers fill no whole blocks.

    Blocks lie along the inputs of a row where they divide them; otherwise they run on from row to row, on a grid of
    one block a row, if they divide the weight; otherwise a type with smaller blocks is taken.
    """
    if kind not in QUANTIZERS:
        raise UnknownName("GGUF type", kind, QUANTIZERS)
    total, columns = math.prod(shape), math.prod(shape[1:] or shape)
    for name in (kind, INSTEAD.get(kind)):
        found = BY_NAME[name] if name else None
        if found and total and total % found.block == 0:
            return found, columns if columns % found.block == 0 else found.block
    return None


def quantize(weight: torch.Tensor, kind: str, importance: torch.Tensor | None = None) -> QuantizedWeight:
    """Quantize a weight, [outputs, inputs, ...], to a type.

    Args:
        weight: whose numbers fill whole blocks (see `fitting`); on the meta device the result is as well.
        kind: name of the type; one that has smaller blocks is taken where its own do not fit.
        importance: [inputs] how much an error in each input's column matters, such as the mean square of the input;
            the K-quants, IQ4_NL and IQ4_XS heed it. None minimizes the error of the weight itself.

    Raises:
        HastenError: numbers that are not finite, too large for 16-bit scales, or of a shape without whole blocks.
    """
    found = fitting(kind, tuple(weight.shape))
    if found is None:
        raise HastenError(f"{list(weight.shape)} numbers fill no whole blocks of {kind} or a smaller type.")
    block_type, columns = found
    if weight.is_meta:
        data = torch.empty(weight.numel() // block_type.block * block_type.size, dtype=torch.uint8, device="meta")
        return block_type.decode(data, tuple(weight.shape), columns)
    values = weight.detach().reshape(-1, block_type.block)
    weights = None if importance is None else _importance(importance, weight)
    step = _chunk(weight.device) // block_type.block
    parts = [
        _part(block_type, values[at : at + step].float(), weights, at * block_type.block)
        for at in range(0, len(values), step)
    ]
    return block_type.weight(joined(parts), tuple(weight.shape), columns)


def _part(kind: BlockType, values: torch.Tensor, importance: torch.Tensor | None, start: int) -> Blocks:
    if not bool(values.isfinite().all()):
        raise HastenError("the weight holds numbers that are not finite, which cannot be quantized.")
    if importance is None:
        weights = torch.ones_like(values)
    else:
        places = torch.arange(start, start + values.numel(), device=values.device)
        weights = importance[places % len(importance)].reshape(values.shape)
    found = QUANTIZERS[kind.name](values, weights)
    scales = (found.scale, found.coarse, found.minimum, found.minimum_coarse)
    if not all(bool(item.isfinite().all()) for item in scales if item is not None and item.is_floating_point()):
        raise HastenError(f"numbers up to {values.abs().max().item():.3g} are too large for {kind.name}.")
    return found


def _importance(importance: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One number for each element of a row, with mean 1 and none so small that its column is given up."""
    if importance.shape != weight.shape[1:2] or not bool((importance.isfinite() & (importance >= 0)).all()):
        raise HastenError(f"importance needs {list(weight.shape[1:2])} finite numbers that are not negative.")
    wide = importance.to(weight.device).float()
    wide = (wide / wide.mean().clamp(min=torch.finfo(torch.float32).tiny)).clamp(min=1e-3)
    return wide.repeat_interleave(math.prod(weight.shape[2:]))


def _chunk(device: torch.device) -> int:
    """Numbers to quantize at a time: what fits a CPU's cache, or keeps a GPU busy."""
    return 1 << 17 if device.type == "cpu" else 1 << 23
