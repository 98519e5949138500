"""Products on GPUs: kernels in Triton, cuBLAS for rows of 8-bit floats, and which suits how many tokens.

A product of few tokens waits for the weight to be read: codes are widened on the way, and activations need not be
rounded. One of many tokens is bound by arithmetic: 8 bits times 8 bits, or the weight widened once and multiplied in 16
bits. The turning points here are rules of thumb; `kernels.tuning` replaces them by measurements.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from hasten.kernels.call import Kernel, Product, row_scales

if TYPE_CHECKING:
    from hasten.kernels.triton.launch import Tile

FEW_TOKENS = {8: 16, 9: 32, 10: 32, 12: 16}
"""Up to how many tokens codes are widened on the way, by major compute capability; 16 for others."""
_SIXTEEN = (torch.float16, torch.bfloat16)


@functools.cache
def usable(device: torch.device) -> bool:
    """Is there Triton, and a GPU it compiles for?"""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def few(product: Product) -> bool:
    """Are there so few tokens that the time goes into reading the weight?"""
    return product.x.shape[0] <= _few(product.x.device)


@functools.cache
def _few(device: torch.device) -> int:
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return FEW_TOKENS.get(major, 16)


@functools.cache
def has_float8(device: torch.device) -> bool:
    """Does the device multiply 8-bit floats? The interpreter on a CPU does."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def _step(product: Product, smallest: int = 16) -> bool:
    from hasten.kernels.triton.launch import step

    return product.is_matrix and step(product, smallest=smallest) is not None


def _reads(product: Product) -> bool:
    """Can kernels read the weight? Converting 8-bit floats needs the same cards as multiplying them."""
    return _step(product) and (product.weight.number.kind != "float" or has_float8(product.x.device))


def _takes_widening(product: Product) -> bool:
    eight = product.activations == "int8" or (product.activations == "float8" and has_float8(product.x.device))
    return _narrow(product) and _reads(product) and (eight or product.activations == "none")


def _takes_rows(product: Product) -> bool:
    pair = (product.activations, product.weight.number.name)
    fits = pair == ("int8", "int8") or (pair == ("float8", "float8_e4m3fn") and has_float8(product.x.device))
    return fits and product.by_row and product.x.shape[1] % 32 == 0 and _rounds(product)


def _takes_scaled(product: Product) -> bool:
    """CuBLAS: rows of e4m3 on both sides, or a scale for the whole of each; no side branch."""
    even = product.x.shape[1] % 16 == 0 and product.weight.shape[0] % 16 == 0 and product.x.dtype == torch.bfloat16
    return product.x.device.type == "cuda" and product.down is None and even and _takes_rows(product)


def _takes_groups(product: Product) -> bool:
    number, zero = product.weight.number, product.weight.zero
    whole = number.kind == "integer" and (number.bits < 8 or (number.name == "int8" and zero is None))
    whole = whole and (zero is None or not zero.is_floating_point()) and product.activations == "int8"
    pair = number.name == "float8_e4m3fn" and product.activations == "float8" and has_float8(product.x.device)
    return (whole or pair) and product.is_matrix and product.group % 32 == 0 and _rounds(product)


def _takes_large_groups(product: Product) -> bool:
    """Minimums need sums of the tokens as well, for which large tiles leave no registers."""
    return _takes_groups(product) and product.weight.minimum is None


def _rounds(product: Product) -> bool:
    """Can the kernel that rounds tokens do all before the product?"""
    return _narrow(product) and _rotates(product)


def _narrow(product: Product) -> bool:
    """Is the input of 16 bits? In 32, rotation and side branch take more registers and shared memory than there are."""
    return product.x.dtype in _SIXTEEN


def _rotates(product: Product) -> bool:
    return product.rotation == 1 or product.rotation >= 16


def _widening(how: Tile, product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    if product.activations == "none" or few(product):
        # Of few tokens nothing is gained by rounding them.
        return launch.widening(product, product.prepared(), None, how)
    return launch.widening(product, *_rounded(product), how)


def _widened(product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    dtype = product.x.dtype
    matrix = launch.widened_weight(product, dtype)
    if product.activations == "none":
        bias = None if product.bias is None else product.bias.to(dtype)
        return product.with_side(F.linear(product.prepared(), matrix, bias))
    codes, scales = _rounded(product)
    found = F.linear(codes.to(torch.bfloat16), matrix.to(torch.bfloat16)) * scales[:, None]
    return product.with_side((found if product.bias is None else found + product.bias).to(dtype))


def _rows(how: Tile, product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    return launch.by_rows(product, *_rounded(product), how)


def _groups(how: Tile, product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    return launch.by_groups(product, *_rounded(product), how)


def _scaled(product: Product) -> torch.Tensor:
    return _scaled_codes(product, *_rounded(product))


def _scaled_codes(product: Product, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    bias = None if product.bias is None else product.bias.to(torch.bfloat16)
    columns = row_scales(product.weight)[None, :]
    return torch._scaled_mm(
        codes, product.weight.codes.t(), scales[:, None], columns, bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip


def multiply_codes(product: Product, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor | None:
    """The product for an input that was rounded before, codes [tokens, inputs] and scales [tokens].

    `product.x` tells sizes and type and is not read. None where no kernel takes it.
    """
    if not usable(codes.device) or not _takes_rows(product):
        return None
    if _takes_scaled(product):
        return _scaled_codes(product, codes, scales)
    from hasten.kernels.triton import launch

    size = next(size for most, *size in _LARGE if codes.shape[0] <= most)
    return launch.by_rows(product, codes, scales, launch.Tile(*size))


def _rounded(product: Product) -> tuple[torch.Tensor, torch.Tensor]:
    from hasten.kernels.triton import launch

    plain = product if _rotates(product) else replace(product, x=product.prepared(), smooth=None, rotation=1)
    return launch.round_tokens(plain)


def _tiles(
    name: str, takes: Callable[[Product], bool], run: Callable[[Tile, Product], torch.Tensor], sizes: list[list[int]]
) -> list[Kernel]:
    """A kernel for each tile; each suits as many tokens as it says first, and more than the one before."""
    from hasten.kernels.triton.launch import Tile

    found: list[Kernel] = []
    for most, *size in sizes:
        how, label = Tile(*size), f"{name}, tiles of {size[0]}x{size[1]} (Triton)"
        found.append(Kernel(label, takes, functools.partial(run, how), functools.partial(_up_to, most)))
    return found


def _up_to(most: int, product: Product) -> bool:
    return few(product) if most == 0 else product.x.shape[0] <= most


_ANY = 1 << 31
_LITTLE = [[0, 16, 64, 4, 4], [0, 32, 64, 4, 3]]
_LARGE = [[128, 64, 128, 4, 4], [512, 128, 128, 8, 3], [_ANY, 128, 256, 8, 3]]


@functools.cache
def kernels() -> list[Kernel]:
    """In order of preference; those of few tokens first."""
    return [
        *_tiles("codes widened on the way", _takes_widening, _widening, _LITTLE),
        Kernel("float8 rows (cuBLAS)", _takes_scaled, _scaled),
        *_tiles("8-bit rows", _takes_rows, _rows, _LARGE),
        *_tiles("8-bit tokens and groups", _takes_large_groups, _groups, [[128, 64, 64, 4, 3], [_ANY, 128, 128, 8, 3]]),
        *_tiles("8-bit tokens and groups with minimum", _takes_groups, _groups, [[_ANY, 64, 64, 4, 3]]),
        Kernel("weight widened first (Triton)", _takes_first, _widened),
    ]


def _takes_first(product: Product) -> bool:
    """Sums of whole numbers exceed float16 only before they are scaled, and that is done in bfloat16."""
    return _takes_widening(product) or (product.activations == "none" and _reads(product))
