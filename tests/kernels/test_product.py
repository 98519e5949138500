"""The operator for products with quantized weights, and its kernels on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.kernels import cpu, gpu, tuning
from hasten.kernels.activations import Activations, int8_tokens
from hasten.kernels.call import Kernel, Product
from hasten.kernels.modules import Input, LowRank, QuantizedLinear
from hasten.kernels.product import choose, chosen, counted, multiply, quantized_linear, reference, tune
from hasten.kernels.rounding import quantize_integer
from tests.kernels.weights import WEIGHTS, made, matrix

KINDS: tuple[Activations, ...] = ("none", "int8", "float8", "int4")


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance relative to the norm."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def product_of(name: str, tokens: int = 5, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Product:
    """A product with one of the small weights."""
    weight = made(name)
    x = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    return dataclasses.replace(Product(x, weight, torch.linspace(-1, 1, weight.shape[0]).to(dtype)), **changes)


def layer_of(name: str, **given: Any) -> QuantizedLinear:
    """A layer with everything that can be before and after the product."""
    weight = made(name)
    outputs, inputs = weight.shape
    smooth, generator = torch.linspace(0.5, 2, inputs), torch.Generator().manual_seed(3)
    pair = torch.randn(4, inputs, generator=generator) / 8, torch.randn(outputs, 4, generator=generator)
    side = LowRank(*pair, torch.tensor([1.0, 0.5, -2.0, 0.0]))
    bias = torch.linspace(-1, 1, outputs)
    return QuantizedLinear(weight, bias, given=Input(smooth=smooth, rotation=8, **given), low_rank=side)


@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_chosen_kernel_agrees_with_the_reference(name: str, activations: Activations) -> None:
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        product = product_of(name, dtype=dtype, activations=activations)
        assert difference(choose(product).run(product), reference(product)) <= most


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 12), st.booleans(), st.booleans(), st.data())
def test_integers_agree_with_the_reference(
    tokens: int, outputs: int, inputs: int, bias: bool, side: bool, data: st.DataObject
) -> None:
    seed = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape = (outputs * 8, inputs * 8)
    weight = quantize_integer(torch.randn(shape, generator=seed), 8)
    x = torch.randn(tokens, shape[1], generator=seed) * 10.0 ** data.draw(st.integers(-15, 15))
    product = Product(x, weight, torch.randn(shape[0], generator=seed) if bias else None, "int8")
    if side:
        pair = {"down": torch.randn(3, shape[1], generator=seed), "up": torch.randn(shape[0], 3, generator=seed)}
        product = dataclasses.replace(product, **pair)
    if cpu.KERNELS[0].takes(product):
        assert difference(cpu.KERNELS[0].run(product), reference(product)) < 1e-5


def test_tokens_are_rounded_in_pieces_as_they_are_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CACHED", 1)
    x = torch.randn(21, 24).bfloat16()
    x[4], x[5, 3] = 0, 6.6e4
    codes, scales = cpu.int8_rows(x)
    expected, by = int8_tokens(x)
    assert torch.equal(codes, expected)
    assert torch.equal(scales, by)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_widened_in_pieces_to_the_same_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_CACHED", 1)
    weight = made(name)
    assert torch.equal(cpu.dequantized(weight, torch.float16), weight.dequantize(torch.float16))


def test_which_kernel_is_used() -> None:
    if cpu._multiplies_integers():
        assert choose(product_of("int8 row", activations="int8")).name == "int8 on CPU"
    assert choose(product_of("int8 row", activations="none")).name == "widened in the cache"
    assert choose(product_of("uint4 g16", activations="int8")).name == "widened in the cache"
    assert choose(product_of("int4 g32", activations="int4")).name == "reference"
    assert chosen(product_of("nf4"), 1000) == "widened in the cache"


def test_kernels_are_counted_while_asked_for() -> None:
    product = product_of("nf4")
    with counted() as outer, counted() as inner:
        multiply(product)
    multiply(product)
    assert inner == outer == {"widened in the cache": 1}


def test_no_tokens_at_all() -> None:
    product = product_of("int8 row", tokens=0, activations="int8")
    assert multiply(product).shape == (0, 24)


@pytest.mark.parametrize("activations", KINDS)
@pytest.mark.parametrize("name", ["int8 row", "uint4 g16", "nf4", "k4", "float8 row", "odd grid"])
def test_a_layer_is_one_graph_of_the_same_numbers(name: str, activations: Activations) -> None:
    layer = layer_of(name, activations=activations)
    x = torch.randn(2, 3, layer.shape[1])
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        assert difference(compiled(x), layer(x)) < 1e-6


@pytest.mark.parametrize("name", ["int8 row", "nf4", "k4"])
def test_the_operator_keeps_the_rules_of_operators(name: str) -> None:
    layer = layer_of(name, activations="int8")
    tensors = [layer._buffers[part] for part in cpu_names()]
    assert layer.down is not None
    assert layer.up is not None
    facts = (list(layer.shape), layer.number, layer.columns, "int8", layer.rotation)
    x = torch.randn(3, layer.shape[1], requires_grad=True)
    pair = (layer.down.clone().requires_grad_(), layer.up.clone().requires_grad_())
    operator = torch.ops.hasten.quantized_linear.default
    torch.library.opcheck(operator, (x, *tensors, layer.bias, None, layer.smooth, *pair, layer.rank_scale, *facts))


def cpu_names() -> tuple[str, ...]:
    from hasten.kernels.weight import TENSORS

    return TENSORS


@pytest.mark.parametrize("name", ["int8 row", "uint4 g16", "nf4"])
def test_gradients_are_those_of_the_plain_layer(name: str) -> None:
    layer = layer_of(name)
    assert layer.down is not None
    assert layer.up is not None
    leaves = [torch.randn(2, 3, layer.shape[1]), layer.down.clone(), layer.up.clone(), torch.randn(layer.shape[0])]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, down, up, bias = leaves
    weight, smooth = layer.quantized, layer.smooth
    product = Product(x, weight, bias, smooth=smooth, rotation=8, down=down, up=up, rank_scale=layer.rank_scale)
    plain = reference(dataclasses.replace(product, x=x.flatten(0, 1)))
    towards = torch.randn(plain.shape)
    expected = torch.autograd.grad(plain, leaves, towards)
    found = torch.autograd.grad(multiply(product).flatten(0, 1), leaves, towards)
    for one, other in zip(found, expected, strict=True):
        assert difference(one, other) < 1e-5


def test_a_layer_computes_what_its_effective_weight_does() -> None:
    layer = layer_of("uint8 g32")
    x = torch.randn(3, layer.shape[1])
    assert difference(layer(x), torch.nn.functional.linear(x, layer.effective(), layer.bias)) < 1e-5


def test_a_frozen_side_branch_keeps_no_input() -> None:
    layer = layer_of("nf4")
    x = torch.randn(3, layer.shape[1], requires_grad=True)
    found = layer(x)
    assert not any(saved is x for saved in found.grad_fn.next_functions[0][0].saved_tensors if saved is not None)  # pyright: ignore
    found.sum().backward()
    assert x.grad is not None
    assert difference(x.grad[0], layer.effective().sum(0)) < 1e-5


@pytest.fixture
def _own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path))
    tuning.forget()
    yield
    tuning.forget()


@pytest.mark.usefixtures("_own_table")
def test_the_fastest_kernel_is_measured_kept_and_used() -> None:
    product = product_of("nf4", tokens=7)
    assert tuning.known(product) is None
    fastest = tune(product)
    assert fastest in ("widened in the cache", "reference")
    tuning.forget()
    assert tuning.known(product) == fastest
    assert tuning.known(product_of("nf4", tokens=8)) == fastest
    assert tuning.known(product_of("nf4", tokens=9)) is None
    # Whatever the table says is used, if it can be.
    tuning._table()[tuning.key(product)] = "reference"
    assert choose(product).name == "reference"
    tuning._table()[tuning.key(product)] = "no such kernel"
    assert choose(product).name == "widened in the cache"


@pytest.mark.usefixtures("_own_table")
def test_a_kernel_that_fails_is_not_chosen_and_a_spoilt_table_is_not_read() -> None:
    def fail(product: Product) -> torch.Tensor:
        raise RuntimeError("out of order")

    product = product_of("nf4")
    with pytest.warns(UserWarning, match="out of order"):
        assert tuning.measure(product, [Kernel("broken", lambda product: True, fail)]) is None
    tuning.place().write_text('{"format": 2, "fastest": 3}')
    tuning.forget()
    with pytest.warns(UserWarning, match="is not read"):
        assert tuning.known(product) is None


def test_gpus_multiply_codes_on_the_way_for_few_tokens_only() -> None:
    assert gpu.few(product_of("nf4", tokens=64))
    assert not gpu.few(product_of("nf4", tokens=65))
    assert gpu.few(product_of("nf4", tokens=16, activations="int8"))
    assert not gpu.few(product_of("nf4", tokens=17, activations="int8"))
    assert not gpu.usable(torch.device("cpu"))


def test_x_of_any_shape() -> None:
    weight = made("int8 row")
    x = torch.randn(2, 2, 3, 64).transpose(1, 2)
    found = quantized_linear(x, weight)
    assert difference(found, x @ weight.dequantize().t()) < 1e-5
    assert matrix().shape == weight.shape
