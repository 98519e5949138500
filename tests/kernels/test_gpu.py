"""Every kernel on a GPU against the reference, on shapes of FLUX and on awkward ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from hasten.kernels import gpu
from hasten.kernels.activations import Activations, float8_tokens, int8_tokens
from hasten.kernels.call import Product
from hasten.kernels.hadamard import rotate
from hasten.kernels.product import choose, kernels, multiply, reference
from hasten.kernels.rounding import quantize_float8, quantize_integer, quantize_table
from hasten.kernels.weight import QuantizedWeight
from tests.kernels.weights import WEIGHTS, made

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(found).all()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def on_gpu(weight: QuantizedWeight) -> QuantizedWeight:
    return weight.map(lambda tensor: tensor.to(CUDA))


def product_of(weight: QuantizedWeight, tokens: int, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Product:
    x = torch.randn(tokens, weight.shape[1], device=CUDA, dtype=dtype)
    bias = torch.randn(weight.shape[0], device=CUDA, dtype=dtype)
    return dataclasses.replace(Product(x, weight, bias), **changes)


def check_all(product: Product, most: float) -> list[str]:
    """Run every kernel that takes a product, and return their names."""
    expected = reference(product)
    able = [kernel for kernel in kernels(CUDA) if kernel.takes(product)]
    for kernel in able:
        found = kernel.run(product)
        assert found.dtype == expected.dtype
        assert difference(found, expected) < most, kernel.name
    return [kernel.name for kernel in able]


@pytest.mark.parametrize("activations", ["none", "int8", "float8", "int4"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_weight(name: str, activations: Activations) -> None:
    weight = on_gpu(made(name))
    # Where few tokens are not rounded at all, kernels differ by what rounding does.
    most = {"none": 1e-2, "int8": 2e-2, "float8": 6e-2, "int4": 1e-2}[activations]
    for tokens in (1, 5, 100):
        names = check_all(product_of(weight, tokens, activations=activations), most)
        if activations != "int4" and not name.startswith("odd") and gpu.usable(CUDA):
            assert len(names) > 1


@pytest.mark.parametrize("tokens", [1, 77, 4608])
@pytest.mark.parametrize(("inputs", "outputs"), [(3072, 12288), (12288, 3072), (3072, 1000)])
def test_sizes_of_flux(tokens: int, inputs: int, outputs: int) -> None:
    matrix = torch.randn(outputs, inputs, device=CUDA) / inputs**0.5
    table = torch.linspace(-1, 1, 16, device=CUDA)
    check_all(product_of(quantize_integer(matrix, 8), tokens, activations="int8"), 2e-2)
    check_all(product_of(quantize_float8(matrix), tokens, activations="float8"), 4e-2)
    check_all(product_of(quantize_float8(matrix, block="block"), tokens, activations="float8"), 4e-2)
    check_all(product_of(quantize_integer(matrix, 4, 64), tokens, activations="int8"), 2e-2)
    check_all(product_of(quantize_integer(matrix, 4, 64, symmetric=False), tokens), 1e-2)
    check_all(product_of(quantize_table(matrix, table, 4, 64), tokens), 1e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rotation", [1, 16, 256])
def test_smoothing_rotation_and_side_branch(bits: int, rotation: int) -> None:
    weight = on_gpu(quantize_integer(torch.randn(640, 768), bits, None if bits == 8 else 64))
    changes: dict[str, Any] = {
        "smooth": torch.rand(768, device=CUDA) + 0.5,
        "rotation": rotation,
        "activations": "int8",
    }
    pair: dict[str, Any] = {"down": torch.randn(40, 768, device=CUDA) / 28, "up": torch.randn(640, 40, device=CUDA)}
    pair["rank_scale"] = torch.rand(40, device=CUDA)
    for tokens in (1, 3, 9, 300):
        product = product_of(weight, tokens, **changes, **pair)
        assert len(check_all(product, 2e-2)) > 1


def test_tokens_are_rounded_as_on_the_cpu() -> None:
    if not gpu.usable(CUDA):
        pytest.skip("needs Triton")
    from hasten.kernels.triton.launch import round_tokens

    product = product_of(on_gpu(made("int8 row")), 50, activations="int8")
    product.x[3] = 0
    codes, scales = round_tokens(product)
    expected, by = int8_tokens(product.x)
    assert torch.equal(scales[:, None], by)
    assert (codes.int() - expected.int()).abs().max() <= 1  # ties may fall either way: division is not exact there
    assert (codes != expected).float().mean() < 1e-3


@pytest.mark.parametrize("rotation", [2, 16, 256])
def test_tokens_are_rotated_before_they_are_rounded(rotation: int) -> None:
    if not gpu.usable(CUDA):
        pytest.skip("needs Triton")
    from hasten.kernels.triton.launch import round_tokens

    weight = on_gpu(quantize_integer(torch.randn(16, 3072), 8))
    product = product_of(weight, 50, activations="int8", rotation=rotation)
    codes, scales = round_tokens(product)
    expected, by = int8_tokens(rotate(product.x.double(), rotation).float())
    assert torch.allclose(scales[:, None], by)
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert (codes != expected).float().mean() < 1e-3


@pytest.mark.parametrize("name", ["int4 g32", "k4", "nf4", "float8 tensor", "int8 row"])
def test_weights_are_recoded_to_rows_of_floats(name: str) -> None:
    if not gpu.usable(CUDA) or not gpu.has_float8(CUDA):
        pytest.skip("needs Triton, and a card that multiplies 8-bit floats")
    from hasten.kernels.triton.launch import recoded

    product = product_of(on_gpu(made(name)), 50, activations="float8")
    found, (expected, scale) = recoded(product).weight, float8_tokens(product.weight.dequantize())
    assert torch.allclose(found.scale.values(), scale)
    assert (found.codes.float() != expected.float()).float().mean() < 1e-2  # where it lies between two of them
    assert difference(found.dequantize(), product.weight.dequantize()) < 4e-2


def test_in_a_graph_of_cuda_and_without_synchronisation() -> None:
    product = product_of(on_gpu(quantize_integer(torch.randn(256, 512), 8)), 100, activations="int8")
    multiply(product)
    torch.cuda.set_sync_debug_mode("error")
    try:
        multiply(product)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = multiply(product)
    product.x.normal_()
    graph.replay()
    assert difference(found, reference(product)) < 2e-2


def test_what_is_chosen() -> None:
    if not gpu.usable(CUDA):
        pytest.skip("needs Triton")
    weight = on_gpu(quantize_integer(torch.randn(256, 512), 8))
    assert choose(product_of(weight, 1, activations="int8")).name.startswith("few tokens")
    assert choose(product_of(weight, 8, activations="int8")).name.startswith("codes widened on the way")
    assert choose(product_of(weight, 4096, activations="int8")).name.startswith("8-bit rows, tiles of 128x128")
    assert choose(product_of(weight, 4096)).name == "weight widened first (Triton)"
    four = on_gpu(quantize_integer(torch.randn(256, 512), 4, 64))
    assert "recoded to 8-bit rows" in choose(product_of(four, 4096, activations="int8")).name
    if gpu.has_float8(CUDA):
        assert "recoded to float8 rows" in choose(product_of(four, 4096, activations="float8")).name
