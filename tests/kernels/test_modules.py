"""Layers with plain buffers: casts, copies, files, compilers, and weights that are moved behind their back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hasten.kernels.modules import Input, LowRank, Quantized, QuantizedConv2d, QuantizedLinear, build
from hasten.kernels.rounding import quantize_float8, quantize_integer, quantize_table
from hasten.kernels.weight import QuantizedWeight
from tests.kernels.test_weight import full

KINDS = ["int8", "int4", "affine", "float8", "block", "table", "coded"]


def weight(kind: str) -> QuantizedWeight:
    plain = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    made = {
        "int8": lambda: quantize_integer(plain, 8),
        "int4": lambda: quantize_integer(plain, 4, 16, scales=torch.float16),
        "affine": lambda: quantize_integer(plain, 3, 16, symmetric=False),
        "float8": lambda: quantize_float8(plain),
        "block": lambda: quantize_float8(plain, block="block"),
        "table": lambda: quantize_table(plain, torch.linspace(-1, 1, 16), 4, 16),
        "coded": lambda: full(16, 32),
    }
    return made[kind]()


def layer(kind: str = "int8", dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(2)
    given = Input(smooth=torch.rand(32, generator=generator).to(dtype) + 0.5, rotation=8, activations="int8")
    low_rank = LowRank(*(torch.randn(s, generator=generator).to(dtype) for s in ((2, 32), (16, 2))))
    return QuantizedLinear(weight(kind), torch.randn(16, generator=generator).to(dtype), given=given, low_rank=low_rank)


def exact(module: Quantized) -> dict[str, torch.Tensor]:
    names = module.quantized.tensors()
    return {name: tensor for name, tensor in module.state_dict().items() if name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_the_effective_weight(kind: str) -> None:
    module, x = QuantizedLinear(weight(kind), torch.randn(16)), torch.randn(2, 3, 32)
    assert torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), atol=1e-4)
    prepared = layer(kind)
    expected = nn.functional.linear(x, prepared.weight, prepared.bias)
    assert (prepared(x) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_casts_leave_codes_and_scales_alone(kind: str) -> None:
    module = layer(kind)
    before, values = exact(module), module.quantized.dequantize()
    for cast in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        module.to(cast)
        after = exact(module)
        assert all(torch.equal(after[name].float(), before[name].float()) for name in before)
        assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
        assert module.bias is not None
        assert module.smooth is not None
        assert module.bias.dtype == module.smooth.dtype == module.weight.dtype == module.dtype == cast
    assert torch.equal(module.half().quantized.dequantize(), values)


def test_a_layer_without_bias_knows_its_type() -> None:
    module = QuantizedLinear(weight("int8"), dtype=torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16
    assert module.float().weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_have_the_type_of_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(3, 32)
    expected = layer()(x)
    found = layer(dtype=dtype)(x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_copies_files_and_rebuilding(kind: str, tmp_path: Path) -> None:
    module, x = layer(kind), torch.randn(3, 32)
    expected = module(x)
    assert torch.equal(copy.deepcopy(module)(x), expected)
    file = tmp_path / "layer.safetensors"
    save_file(module.state_dict(), file)
    stored = load_file(file)
    assert torch.equal(build(module.describe(), stored)(x), expected)
    other = layer(kind)
    for buffer in other.buffers():
        buffer.data = torch.zeros_like(buffer)
    other.load_state_dict(stored)
    assert torch.equal(other(x), expected)


def test_layers_share_no_memory(tmp_path: Path) -> None:
    table = torch.linspace(-1, 1, 16)
    made = [quantize_table(torch.randn(8, 16), table, 4, 16) for _ in range(2)]
    both = nn.ModuleList([QuantizedLinear(one) for one in made])
    save_file(both.state_dict(), tmp_path / "both.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_and_the_same_result(kind: str) -> None:
    module, x = layer(kind), torch.randn(3, 32)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


def test_weights_that_are_moved_behind_its_back() -> None:
    """As offloading does it: other storage under the same tensors, and back again."""
    module, x = layer("coded"), torch.randn(3, 32)
    expected, tensors = module(x), {**dict(module.named_buffers()), **dict(module.named_parameters())}
    home = {name: tensor.data for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.data = tensor.data.clone()
    assert torch.equal(module(x), expected)
    for name, tensor in tensors.items():
        tensor.data = home[name]
    assert all(tensor is tensors[name] for name, tensor in module.named_buffers())
    assert torch.equal(module(x), expected)


def test_without_storage_and_back() -> None:
    module, x = layer(), torch.randn(3, 32)
    empty = copy.deepcopy(module).to("meta")
    assert empty(x.to("meta")).shape == (3, 16)
    assert {n: (t.shape, t.dtype) for n, t in empty.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in module.state_dict().items()
    }
    filled = empty.to_empty(device="cpu")
    filled.load_state_dict(module.state_dict())
    assert torch.equal(filled(x), module(x))


def test_gradients_reach_the_input_and_not_the_weight() -> None:
    module = QuantizedLinear(weight("int4"), torch.randn(16))
    x = torch.randn(3, 32, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, module.weight.sum(0).expand(3, -1), atol=1e-4)
    assert not next(iter(module.parameters())).requires_grad
    assert len(list(module.parameters())) == 1


def test_an_input_without_tokens() -> None:
    assert layer()(torch.randn(2, 0, 32)).shape == (2, 0, 16)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions(kernel: int, layout: torch.memory_format) -> None:
    plain = nn.Conv2d(16, 24, kernel, padding=kernel // 2)
    module = QuantizedConv2d(
        quantize_integer(plain.weight, 8), plain.bias, padding=(kernel // 2, kernel // 2), dtype=torch.float32
    )
    x = torch.randn(2, 16, 6, 8).contiguous(memory_format=layout)
    assert torch.allclose(module(x), plain(x), atol=0.05)
    assert module.weight.shape == plain.weight.shape
    assert module(x).is_contiguous(memory_format=layout) or kernel == 1
    assert copy.deepcopy(module)(x).shape == (2, 24, 6, 8)


def test_adapters_stand_around_it() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.Sequential(layer("int4"), nn.GELU())
    x = torch.randn(3, 32)
    expected = model(x)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=True), model)
    assert torch.equal(model(x), expected), "an adapter starts as nothing"
    up = next(p for n, p in model.named_parameters() if "lora_B" in n)
    nn.init.ones_(up)
    assert not torch.allclose(model(x), expected)
