"""Products on GPUs: kernels in Triton, cuBLAS for rows of 8-bit floats, and which suits how many tokens.

A product of few tokens waits for the weight to be read: codes are widened on the way, and activations need not be
rounded. One of many tokens is bound by arithmetic: 8 bits times 8 bits, for which other weights are recoded to rows of
8 bits first, or the weight widened once and multiplied in 16 bits. The turning points here are rules of thumb from an
H100 (3072 inputs, 12288 outputs, and the reverse); `kernels.tuning` replaces them by measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from hasten.kernels.call import Kernel, Product, row_scales
from hasten.kernels.serving import HAVE_TRITON

if TYPE_CHECKING:
    from hasten.kernels.triton.launch import Tile

FEW_TOKENS = {8: 16, 9: 32, 10: 32, 12: 16}
"""Up to how many tokens codes are widened on the way instead of multiplying 8 bits by 8 bits, by major compute
capability; 16 for others."""
FEW_WIDE_TOKENS = 64
"""The same where activations keep 16 bits, and the other way is to write a matrix of 16 bits and read it again: an H100
takes 0.044 ms for 64 tokens and 8-bit codes instead of 0.084."""
GEMV_TOKENS = 4
"""Up to how many tokens there is nothing to gain from tensor cores."""
GROUP_TOKENS = 128
"""Up to how many tokens sums of groups are scaled one by one: 4-bit groups of 64 take an H100 0.048 ms for 64 tokens
and 1.7 for 4608, rows of 8 bits 0.031 and 0.34, and recoding the weight to such with the product of 4608 0.46."""
RECODED_BITS = 5
"""Weights of more bits are recoded only where times were measured. In rows with a long tail (Student's t, 4 degrees of
freedom) it adds an error of 2 to 4 %: little beside the 16 % of 4-bit groups, but as much as 8-bit blocks have."""
_SIXTEEN = (torch.float16, torch.bfloat16)


@functools.cache
def usable(device: torch.device) -> bool:
    """Is there Triton, and a GPU it compiles for?"""
    if device.type != "cuda" or not HAVE_TRITON:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def few(product: Product) -> bool:
    """Are there so few tokens that the time goes into reading the weight?"""
    most = FEW_WIDE_TOKENS if product.activations == "none" else _few(product.x.device)
    return product.x.shape[0] <= most


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
    return _narrow(product) and _reads(product) and (_eight(product) or product.activations == "none")


def _eight(product: Product) -> bool:
    """Are activations rounded to 8 bits that the device multiplies?"""
    return product.activations == "int8" or (product.activations == "float8" and has_float8(product.x.device))


def _takes_gemv(product: Product) -> bool:
    if not _takes_widening(product) or product.weight.number.bits not in (4, 8):
        return False
    from hasten.kernels.triton.launch import piece

    return product.x.shape[0] <= GEMV_TOKENS and product.x.shape[1] % 32 == 0 and piece(product) >= 8


def _takes_recoding(product: Product) -> bool:
    return _takes_widening(product) and _eight(product) and product.x.shape[1] % 32 == 0 and not _takes_rows(product)


def _recodes_well(product: Product) -> bool:
    """Is what recoding loses small beside what quantization has lost? Whole numbers with one scale lose nothing."""
    exact = product.by_row and product.weight.number.kind == "integer" and product.activations == "int8"
    return exact or product.weight.number.bits <= RECODED_BITS


def _takes_recoding_scaled(product: Product) -> bool:
    return _takes_recoding(product) and _scales(product)


def _takes_rows(product: Product) -> bool:
    pair = (product.activations, product.weight.number.name)
    fits = pair == ("int8", "int8") or (pair == ("float8", "float8_e4m3fn") and has_float8(product.x.device))
    return fits and product.by_row and product.x.shape[1] % 32 == 0 and _narrow(product)


def _takes_scaled(product: Product) -> bool:
    return _takes_rows(product) and _scales(product)


def _scales(product: Product) -> bool:
    """Does cuBLAS multiply rows of e4m3, or such with a scale for the whole, of these sizes? It has no side branch."""
    even = product.x.shape[1] % 16 == 0 and product.weight.shape[0] % 16 == 0 and product.x.dtype == torch.bfloat16
    # CuBLAS has no algorithm for some single tokens.
    there = product.x.is_cuda and product.x.shape[0] >= 16
    return there and even and product.activations == "float8" and product.down is None


def _takes_groups(product: Product) -> bool:
    number, zero = product.weight.number, product.weight.zero
    whole = number.kind == "integer" and (number.bits < 8 or (number.name == "int8" and zero is None))
    whole = whole and (zero is None or not zero.is_floating_point()) and product.activations == "int8"
    pair = number.name == "float8_e4m3fn" and product.activations == "float8" and has_float8(product.x.device)
    return (whole or pair) and product.is_matrix and product.group % 32 == 0 and _narrow(product)


def _takes_large_groups(product: Product) -> bool:
    """Minimums need sums of the tokens as well, for which large tiles leave no registers."""
    return _takes_groups(product) and product.weight.minimum is None


def _narrow(product: Product) -> bool:
    """Is the input of 16 bits? In 32, rotation and side branch take more registers and shared memory than there are."""
    return product.x.dtype in _SIXTEEN


def _widening(how: Tile, product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    if product.activations == "none" or few(product):
        # Of few tokens nothing is gained by rounding them.
        return launch.widening(product, product.prepared(), None, how)
    return launch.widening(product, *launch.round_tokens(product), how)


def _gemv(product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    return launch.few_tokens(product)


def _widened(product: Product) -> torch.Tensor:
    """In 16 bits nothing is gained by rounding activations."""
    from hasten.kernels.triton import launch

    matrix = launch.widened_weight(product, product.x.dtype)
    bias = None if product.bias is None else product.bias.to(product.x.dtype)
    return product.with_side(F.linear(product.prepared(), matrix, bias))


def _rows(how: Tile, product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    return launch.by_rows(product, *launch.round_tokens(product), how)


def _recoded_rows(how: Tile, product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    return _rows(how, launch.recoded(product))


def _recoded_scaled(product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    return _scaled(launch.recoded(product))


def _groups(how: Tile, product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    return launch.by_groups(product, *launch.round_tokens(product), how)


def _scaled(product: Product) -> torch.Tensor:
    from hasten.kernels.triton import launch

    return _scaled_codes(product, *launch.round_tokens(product))


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
    if not usable(codes.device) or not (_takes_rows(product) or _takes_recoding(product)):
        return None
    from hasten.kernels.triton import launch

    if not _takes_rows(product):
        if _takes_groups(product) and (_up_to(GROUP_TOKENS, product) or not _recodes_well(product)):
            return launch.by_groups(product, codes, scales, launch.Tile(*GROUPS[0]))
        product = launch.recoded(product)
    if _scales(product):
        return _scaled_codes(product, codes, scales)
    return launch.by_rows(product, codes, scales, launch.Tile(*_row_tile(product)))


Sizes = tuple[int, int, int, int]
"""Tokens and outputs of a tile, warps and stages."""
ROWS: tuple[Sizes, ...] = ((64, 128, 4, 4), (128, 128, 8, 3), (128, 256, 8, 3))
GROUPS: tuple[Sizes, ...] = ((64, 64, 4, 3), (128, 128, 8, 3))
WIDENING: tuple[Sizes, ...] = ((16, 64, 4, 4), (32, 64, 4, 3), (64, 64, 4, 3))


def _row_tile(product: Product) -> Sizes:
    """The tile for 8-bit rows. On an H100 squares are fastest, also with a side branch, except for floats."""
    tokens = product.x.shape[0]
    small, square, wide = ROWS
    if tokens <= 128:
        return small
    return wide if tokens > 512 and product.activations == "float8" else square


def _tiled(
    name: str,
    size: Sizes,
    takes: Callable[[Product], bool],
    run: Callable[[Tile, Product], torch.Tensor],
    suits: Callable[[Product], bool],
) -> Kernel:
    from hasten.kernels.triton.launch import Tile

    return Kernel(f"{name}, tiles of {size[0]}x{size[1]} (Triton)", takes, functools.partial(run, Tile(*size)), suits)


def _by_rows(
    name: str,
    takes: Callable[[Product], bool],
    run: Callable[[Tile, Product], torch.Tensor],
    suits: Callable[[Product], bool] = lambda product: True,
) -> list[Kernel]:
    """A kernel for each tile."""
    return [_tiled(name, size, takes, run, functools.partial(_suits_rows, size, suits)) for size in ROWS]


def _suits_rows(size: Sizes, suits: Callable[[Product], bool], product: Product) -> bool:
    return _row_tile(product) == size and suits(product)


def _up_to(most: int, product: Product) -> bool:
    return product.x.shape[0] <= most


def _only_measured(product: Product) -> bool:
    """Chosen where it has been measured to be fastest."""
    return False


@functools.cache
def kernels() -> list[Kernel]:
    """In order of preference; those of few tokens first."""
    widening = functools.partial(_tiled, "codes widened on the way")
    groups = functools.partial(_tiled, "8-bit tokens and groups")
    return [
        Kernel("few tokens, row by row (Triton)", _takes_gemv, _gemv),
        widening(WIDENING[0], _takes_widening, _widening, lambda product: few(product) and _up_to(16, product)),
        widening(WIDENING[1], _takes_widening, _widening, few),
        widening(WIDENING[2], _takes_widening, _widening, _only_measured),
        Kernel("float8 rows (cuBLAS)", _takes_scaled, _scaled),
        *_by_rows("8-bit rows", _takes_rows, _rows),
        groups(GROUPS[0], _takes_groups, _groups, functools.partial(_up_to, GROUP_TOKENS)),
        groups(GROUPS[1], _takes_large_groups, _groups, _only_measured),
        Kernel("weight recoded to float8 rows first (cuBLAS)", _takes_recoding_scaled, _recoded_scaled, _recodes_well),
        *_by_rows("weight recoded to 8-bit rows first", _takes_recoding, _recoded_rows, _recodes_well),
        Kernel("weight widened first (Triton)", _takes_first, _widened),
    ]


def _takes_first(product: Product) -> bool:
    return _takes_widening(product) or (product.activations == "none" and _reads(product))
