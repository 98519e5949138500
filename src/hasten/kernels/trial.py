"""Tries the kernels of quantized products on small products of every kind, in a process of their own (`python -m`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from hasten.core.diagnosis import Finding, in_words
from hasten.core.trying import report
from hasten.kernels.activations import Activations
from hasten.kernels.call import Kernel, Product
from hasten.kernels.product import kernels, reference
from hasten.kernels.rounding import quantize_float8, quantize_integer, quantize_table
from hasten.kernels.weight import QuantizedWeight, Scales

KIND = "quantized product"
_LIMIT = {"none": 0.01, "int8": 0.02, "float8": 0.06, "int4": 0.01}
"""How far results may be apart, relative to their norm: kernels for few tokens leave activations as they are."""


def weights(rows: int = 256, columns: int = 512) -> dict[str, QuantizedWeight]:
    """Weights of the usual kinds, by their names in the report."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) / columns**0.5
    table = torch.linspace(-1, 1, 16)
    double = quantize_table(matrix, table, 4, 64)
    fine = (double.scale.values() * 255 / double.scale.values().amax(1, keepdim=True)).round().clamp(1).to(torch.uint8)
    coarse = double.scale.values().amax(1, keepdim=True) / 255
    return {
        "int8 rows": quantize_integer(matrix, 8),
        "int4 groups": quantize_integer(matrix, 4, 64),
        "uint6 groups": quantize_integer(matrix, 6, 32, symmetric=False, scales=torch.float16),
        "4-bit table": replace(double, scale=Scales(fine, coarse)),
        "float8 rows": quantize_float8(matrix),
        "float8 blocks": quantize_float8(matrix, block="block"),
    }


def products(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Product]]:
    """Every weight with every rounding of activations, few tokens and many, with all that may be before and after."""
    kinds: tuple[Activations, ...] = ("none", "int8", "float8")
    for tokens in (3, 300):
        x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        smooth, down, up = (torch.linspace(0.5, 2, size, device=device) for size in (512, 16 * 512, 256 * 16))
        side = {"down": down.reshape(16, 512) / 512, "up": up.reshape(256, 16) / 16}
        for name, weight in weights().items():
            product = Product(x, weight.map(lambda tensor: tensor.to(device)), smooth[:256])
            for activations in kinds:
                plain = replace(product, activations=activations)
                yield f"{tokens} tokens, {name}, activations {activations}", plain
                yield (
                    f"{tokens} tokens, {name}, activations {activations}, all",
                    replace(plain, smooth=smooth, rotation=256, **side),
                )


def examine(name: str, device: torch.device, dtype: torch.dtype) -> Finding:
    """Say whether a kernel is usable: how its results compare with the reference on what it takes."""
    kernel = next(kernel for kernel in kernels(device) if kernel.name == name)
    errors = {case: _error(kernel, case, product) for case, product in products(device, dtype) if kernel.takes(product)}
    wrong = [
        f"{case}: off by {100 * error:.2g} %"
        for case, error in errors.items()
        if not error <= next(limit for kind, limit in _LIMIT.items() if f"activations {kind}" in case)
    ]
    if wrong:
        return Finding(kind=KIND, name=name, status="broken", detail=f"wrong results ({'; '.join(wrong)})")
    if not errors:
        return Finding(kind=KIND, name=name, status="unfit", detail="takes none of the usual products on this device")
    detail = f"{len(errors)} kinds of products right, error at most {100 * max(errors.values()):.2g} %"
    return Finding(kind=KIND, name=name, status="usable", detail=detail)


def _error(kernel: Kernel, case: str, product: Product) -> float:
    expected = reference(product).float()
    try:
        found = kernel.run(product).float()
    except Exception as error:
        raise RuntimeError(f"{case}: {in_words(error)}") from error
    return float((found - expected).norm() / expected.norm())


if __name__ == "__main__":
    place = torch.device(sys.argv[1])
    with torch.no_grad():
        report(KIND, sys.argv[2:], lambda name: examine(name, place, torch.bfloat16))
