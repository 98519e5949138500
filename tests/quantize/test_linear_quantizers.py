"""What the quantizers without calibration make of layers, networks and each other."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn

import hasten
from hasten.core.errors import HastenError
from hasten.core.target import Target
from hasten.core.technique import Technique
from hasten.core.workload import Workload
from hasten.kernels.modules import Quantized, QuantizedConv2d, QuantizedLinear
from hasten.quantize import BitsAndBytes, Float8Linear, Int4Linear, Int8Linear, WeightOnly
from hasten.quantize.engine.linear_quantizer import LinearQuantizer
from hasten.quantize.engine.sites import Site, sites
from tests.contract.rigs import make, plain_output

QUANTIZERS: list[LinearQuantizer] = [
    Int8Linear(),
    Int8Linear(activations="none"),
    Float8Linear(),
    Float8Linear(granularity="tensor"),
    Float8Linear(granularity="block"),
    Float8Linear(number="e5m2"),
    Float8Linear(input_scale=0.05),
    Float8Linear(activations="none"),
    Int4Linear(),
    Int4Linear(activations="int8", symmetric=False),
    WeightOnly(bits=3),
    WeightOnly(bits=6, symmetric=True),
    BitsAndBytes(),
    BitsAndBytes(quant_type="fp4", double_quant=False),
    BitsAndBytes(bits=8),
]
LIMITS = {"Int8Linear": 0.02, "Float8Linear": 0.06, "Int4Linear": 0.17, "WeightOnly": 0.3, "BitsAndBytes": 0.17}


def site(layer: nn.Linear | nn.Conv2d) -> Site:
    return Site("denoiser", "blocks.0.q", nn.ModuleDict({"q": layer}), layer)


def quantized(technique: LinearQuantizer, layer: nn.Linear | nn.Conv2d) -> Quantized:
    return cast(Quantized, technique.quantize(site(layer)))


@pytest.mark.parametrize("technique", QUANTIZERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_layer(technique: LinearQuantizer, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64).to(dtype), torch.randn(2, 16, 256).to(dtype)
    module = quantized(technique, layer)
    exact = layer(x).float()
    error = (module(x).float() - exact).norm() / exact.norm()
    assert 1e-4 < error < (0.1 if technique == Float8Linear(number="e5m2") else LIMITS[type(technique).__name__])
    assert module(x).dtype == dtype
    assert module.bias is layer.bias or torch.equal(cast(torch.Tensor, module.bias), layer.bias)


@pytest.mark.parametrize("technique", QUANTIZERS[::3], ids=repr)
def test_predicted_bytes_are_those_that_are_held(technique: LinearQuantizer) -> None:
    rig = make("stable_diffusion")
    target = Target.of(rig)
    predicted = technique.cost(target, Workload(prompts=("a",), steps=4)).held["unet"]
    with rig.accelerated(technique):
        network = rig.denoiser
        assert predicted == sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert predicted < sum(t.nbytes for t in (*network.parameters(), *network.buffers()))


def test_finer_grids_lose_less() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64), torch.randn(64, 256)
    layer.weight.data *= torch.logspace(-2, 1, 64).unsqueeze(1)

    def error(technique: LinearQuantizer) -> float:
        scale = layer(x).abs().mean(0)
        return ((quantized(technique, layer)(x) - layer(x)).abs().mean(0) / scale).mean().item()

    assert error(Float8Linear()) < error(Float8Linear(granularity="tensor"))
    assert error(Int4Linear(group=32)) < error(Int4Linear(group=256))
    assert error(Int8Linear()) < error(Float8Linear()) < error(Float8Linear(number="e5m2"))
    assert error(Int4Linear()) < error(WeightOnly(bits=3, symmetric=True))
    assert error(Int4Linear()) < error(Int4Linear(activations="int8")) < 1.02 * error(Int4Linear())


@pytest.mark.parametrize("technique", [Int8Linear(), Float8Linear(), Int4Linear(activations="int8"), WeightOnly()])
def test_pointwise_convolutions_of_a_u_net(technique: LinearQuantizer) -> None:
    conv, x = nn.Conv2d(64, 32, 1), torch.randn(2, 64, 5, 7)
    module = quantized(technique, conv)
    assert isinstance(module, QuantizedConv2d)
    assert (module(x) - conv(x)).norm() < LIMITS[type(technique).__name__] * conv(x).norm()
    assert module(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_which_layers_are_taken() -> None:
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(16, 16), "odd": nn.Linear(12, 16)})])
    network.blocks[0].update({"wide": nn.Conv2d(16, 16, 3), "point": nn.Conv2d(16, 16, 1)})  # pyright: ignore
    network.blocks[0].update({"kept": nn.Linear(16, 16), "special": nn.Bilinear(8, 8, 8)})  # pyright: ignore
    network.proj_out = nn.Linear(16, 16)
    network._keep_in_fp32_modules = ["kept"]  # pyright: ignore
    target = Target.of(network)
    assert [found.path for found in sites(target, ("*",), (), True)] == ["blocks.0.q", "blocks.0.point"]
    assert [found.path for found in sites(target, ("*",), ())] == ["blocks.0.q"]
    assert not sites(target, ("*",), ("*.q",))
    assert not sites(target, ("other",), ())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_named_and_nothing_is_left_behind(value: float) -> None:
    rig = make("dit")
    path = sites(Target.of(rig), ("transformer",), ())[3].path
    layer = cast(nn.Linear, rig.denoiser.get_submodule(path))
    before, kept = dict(rig.denoiser.named_modules()), layer.weight[2, 3].item()
    layer.weight.data[2, 3] = value
    for technique in (Int8Linear(), Float8Linear(), WeightOnly(), BitsAndBytes(), BitsAndBytes(bits=8)):
        with pytest.raises(HastenError, match=rf"transformer\.{path}: the weight holds numbers that are NaN or inf"):
            rig.accelerated(technique)
        assert dict(rig.denoiser.named_modules()) == before
    layer.weight.data[2, 3] = kept
    assert torch.equal(rig.run(), plain_output("dit"))


def test_weights_that_are_quantized_are_not_quantized_again() -> None:
    rig = make("dit")
    hasten.apply_permanently(rig, Int8Linear())
    with pytest.raises(HastenError, match="no linear layers"):
        rig.accelerated(Int4Linear())


def test_a_component_that_is_not_there() -> None:
    with pytest.raises(HastenError, match="no component is called"):
        make("dit").accelerated(Int8Linear(components=("text_encoder",)))


def layers(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, Quantized)]


@pytest.mark.parametrize("place", ["keep", "cpu", "drop"])
def test_originals(place: Any) -> None:
    rig = make("dit")
    weights = [found.layer for found in sites(Target.of(rig), ("transformer",), ())]
    technique = Int8Linear(originals=place)
    if place == "drop":
        with pytest.raises(HastenError, match="apply_permanently"):
            rig.accelerated(technique)
        hasten.apply_permanently(rig, technique)
        assert all(layer.weight.numel() == 0 for layer in weights)
    else:
        with rig.accelerated(technique):
            assert all(layer.weight.numel() for layer in weights)
            expected = rig.run()
        assert torch.equal(rig.run(), plain_output("dit"))
        hasten.apply_permanently(rig, technique)
        assert torch.equal(rig.run(), expected)
    assert len(layers(rig.denoiser)) == len(weights)


def test_a_quantized_network_can_be_copied() -> None:
    rig = make("flux")
    with rig.accelerated(Int4Linear(activations="int8")):
        expected = rig.run()
        other = copy.deepcopy(rig.denoiser)
    assert layers(other)
    assert not layers(rig.denoiser)
    rig.denoiser = rig.components["transformer"] = other
    assert torch.equal(rig.run(), expected)


@pytest.mark.parametrize("technique", [Int8Linear(), BitsAndBytes(), Int4Linear()])
@pytest.mark.parametrize("before", [False, True])
def test_lora_adapters_may_come_before_or_later(technique: Technique, before: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    def adapt() -> None:
        torch.manual_seed(5)
        config = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_out.0"], init_lora_weights=False)
        inject_adapter_in_model(config, rig.denoiser)

    rig = make("flux")
    if before:
        adapt()
    adapted_only = rig.run() if before else None
    with rig.accelerated(technique):
        if not before:
            quantized_only = rig.run()
            adapt()
            assert not torch.equal(rig.run(), quantized_only)
        adapted = [m for n, m in rig.denoiser.named_modules() if n.endswith("to_q.base_layer")]
        assert adapted
        assert all(isinstance(module, QuantizedLinear) for module in adapted)
        both = rig.run()
    if adapted_only is not None:
        assert torch.equal(rig.run(), adapted_only)
        assert not torch.equal(both, adapted_only)
    else:
        adapted_only = rig.run()
    assert not layers(rig.denoiser), "the originals are back, inside the adapters"
    assert (both - adapted_only).abs().mean() < 0.2 * adapted_only.abs().mean()
    assert not torch.equal(adapted_only, plain_output("flux"))
