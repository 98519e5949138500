"""Kernels in Triton against the reference, in Triton's interpreter: run by test_triton in a process of its own.

In float16, as the interpreter multiplies the bits of bfloat16.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hasten.kernels import gpu
from hasten.kernels.call import Kernel, Product
from hasten.kernels.product import reference
from hasten.kernels.rounding import quantize_float8
from tests.kernels.weights import WEIGHTS, made


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def named(start: str) -> list[Kernel]:
    return [kernel for kernel in gpu.kernels() if kernel.name.startswith(start)]


def product_of(name: str, tokens: int = 5, **changes: object) -> Product:
    weight = made(name)
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-1, 1, weight.shape[0])
    return dataclasses.replace(Product(x.half(), weight, bias.half()), **changes)  # pyright: ignore


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_widened_first(name: str) -> None:
    (kernel,) = named("weight widened first")
    product = dataclasses.replace(product_of(name), x=product_of(name).x.float())
    if kernel.takes(product):
        assert difference(kernel.run(product), reference(product)) < 1e-6
    else:
        assert name.startswith("odd")


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight_widened_on_the_way(name: str) -> None:
    kernel = named("codes widened")[0]
    product = product_of(name)
    assert kernel.takes(product) == (not name.startswith("odd"))
    if kernel.takes(product):
        assert difference(kernel.run(product), reference(product)) < 5e-3


def test_widened_on_the_way_with_rounded_tokens_and_a_side_branch() -> None:
    down, up = torch.randn(20, 64) / 8, torch.randn(24, 20) / 8
    product = product_of("uint4 g32", tokens=40, activations="int8", down=down.half(), up=up.half())
    product = dataclasses.replace(product, smooth=torch.rand(64) + 0.5, rotation=16)
    assert difference(named("codes widened")[1].run(product), reference(product)) < 1.5e-2


@pytest.mark.parametrize("rotation", [1, 16, 64])
@pytest.mark.parametrize("side", [False, True])
def test_rows_of_integers(rotation: int, side: bool) -> None:
    product = product_of("int8 row", tokens=21, activations="int8", rotation=rotation, smooth=torch.rand(64) + 0.5)
    if side:
        product = dataclasses.replace(product, down=torch.randn(5, 64).half(), up=torch.randn(24, 5).half())
    kernels = named("8-bit rows")[:1]
    assert all(kernel.takes(product) for kernel in kernels)
    for kernel in kernels:
        assert difference(kernel.run(product), reference(product)) < 1.2e-2


@pytest.mark.parametrize("name", ["int4 g32", "uint4 g32", "int8 g32", "uint5 g32", "k4", "k3"])
def test_groups_of_integers_are_summed_exactly(name: str) -> None:
    product = product_of(name, tokens=18, activations="int8")
    able = [kernel for kernel in named("8-bit tokens and groups") if kernel.takes(product)]
    assert len(able) == {"k3": 0, "k4": 1}.get(name, 3)
    assert all(difference(kernel.run(product), reference(product)) < 5e-3 for kernel in able[-1:])


def test_tokens_are_rounded_as_the_reference_rounds() -> None:
    from hasten.kernels.activations import int8_tokens
    from hasten.kernels.triton.launch import round_tokens

    product = product_of("int8 row", tokens=7, activations="int8")
    product.x[3] = 0
    codes, scales = round_tokens(product)
    expected, by = int8_tokens(product.x)
    assert torch.equal(codes, expected)
    assert torch.equal(scales[:, None], by)


def test_rows_and_blocks_of_floats() -> None:
    # The interpreter rounds to 8-bit floats wrongly, so the tokens are rounded here; a GPU test does the rest.
    from hasten.kernels.activations import float8_tokens
    from hasten.kernels.triton import launch

    x = torch.randn(9, 256).half()
    codes, scales = float8_tokens(x)
    for block, run in (("row", launch.by_rows), ("tensor", launch.by_rows), ("block", launch.by_groups)):
        product = Product(x, quantize_float8(torch.randn(24, 256), block=block), None, "float8")
        found = run(product, codes, scales.reshape(-1), launch.Tile(16, 32, 4, 2))
        assert difference(found, reference(product)) < 5e-3


def test_shapes_beyond_a_tile() -> None:
    weight = quantize_float8(torch.randn(200, 256), block="row")
    product = Product(torch.randn(150, 256).half(), weight)
    assert difference(named("codes widened")[0].run(product), reference(product)) < 2e-3
