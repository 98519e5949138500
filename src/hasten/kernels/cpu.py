"""Products on the CPU: integers through oneDNN, other codes widened in pieces that stay in the cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from hasten.kernels.activations import float8_tokens
from hasten.kernels.call import Kernel, Product, row_scales
from hasten.kernels.rounding import positive
from hasten.kernels.weight import QuantizedWeight

_CACHED = 1 << 20
"""Numbers that are worked on at a time: few enough for the cache, many enough that threads seldom wait."""


def dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """What `QuantizedWeight.dequantize` gives, [outputs, inputs], made in pieces: several times as fast on a CPU."""
    rows, columns = weight.codes.shape[0], weight.columns
    if rows != weight.shape[0] or rows * columns <= _CACHED:
        return weight.dequantize(dtype).reshape(weight.shape[0], -1)
    found = torch.empty(rows, columns, dtype=dtype, device=weight.codes.device)
    sizes = [part.shape[0] for part in found.split(_rows(columns))]
    for into, part in zip(found.split(sizes), weight.split(sizes), strict=True):
        into.copy_(part.dequantize().reshape(into.shape))
    return found


def int8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What `activations.int8_tokens` gives, in one pass over memory."""
    tokens, inputs = x.shape
    codes = torch.empty(tokens, inputs, dtype=torch.int8)
    scales = torch.empty(tokens, 1)
    buffer = torch.empty(min(_rows(inputs), tokens), inputs)
    for part in _parts(tokens, inputs):
        exact = buffer[: part.stop - part.start]
        exact.copy_(x[part])
        scales[part] = positive(exact.abs().amax(-1, keepdim=True) / 127)
        codes[part] = exact.div_(scales[part]).round_()
    return codes, scales


def _integers(product: Product) -> torch.Tensor:
    """W8A8: the sums are exact integers; scales, bias and rounding follow row by row while these are in the cache."""
    codes, scales = int8_rows(product.prepared())
    sums = torch._int_mm(codes, product.weight.codes.t())
    found = torch.empty(sums.shape, dtype=product.x.dtype)
    columns = row_scales(product.weight)
    bias = None if product.bias is None else product.bias.float()
    buffer = torch.empty(min(_rows(sums.shape[1]), sums.shape[0]), sums.shape[1])
    for part in _parts(*sums.shape):
        exact = buffer[: part.stop - part.start]
        exact.copy_(sums[part]).mul_(columns)
        exact = exact.mul_(scales[part]) if bias is None else torch.addcmul(bias, exact, scales[part], out=exact)
        found[part] = exact
    return _add_side(product, found)


def _widened(product: Product) -> torch.Tensor:
    """Any weight with its values in the type of the input; 8-bit activations are exact in 16 bits before scaling."""
    plain, dtype = product.plain(), product.x.dtype
    matrix = dequantized(product.weight, dtype)
    if product.activations == "none":
        return _add_side(product, F.linear(plain.x, matrix, None if product.bias is None else product.bias.to(dtype)))
    given = product.input_scale
    codes, scales = int8_rows(plain.x) if product.activations == "int8" else float8_tokens(plain.x, given)
    found = F.linear(codes.to(dtype), matrix).float().mul_(scales)
    return _add_side(product, (found if product.bias is None else found.add_(product.bias)).to(dtype))


def _add_side(product: Product, found: torch.Tensor) -> torch.Tensor:
    if product.down is None or product.up is None:
        return found
    return found.addmm_(product.ranks(), product.up.to(found.dtype).t())


def _rows(columns: int) -> int:
    return max(8, _CACHED // columns)


def _parts(rows: int, columns: int) -> Iterator[slice]:
    step = _rows(columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


@functools.cache
def _multiplies_integers() -> bool:
    """Is there an instruction for it? Elsewhere a product of integers is slower than one of 32-bit floats."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def _on_cpu(product: Product) -> bool:
    return product.x.device.type == "cpu" and product.x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _takes_integers(product: Product) -> bool:
    eight = product.activations == "int8" and product.weight.number.name == "int8"
    return _on_cpu(product) and eight and product.by_row and _multiplies_integers()


def _takes_wide(product: Product) -> bool:
    """Sums of codes exceed float16."""
    eight = product.activations in ("int8", "float8") and product.x.dtype != torch.float16
    return _on_cpu(product) and (eight or product.activations == "none")


KERNELS = (
    Kernel("int8 on CPU", _takes_integers, _integers),
    Kernel("widened in the cache", _takes_wide, _widened),
)
"""Fast ones first."""
