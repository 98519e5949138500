"""HadamardRotation, and that quantizers take over what is done to the inputs of a layer."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

import hasten
from hasten.core.errors import HastenError
from hasten.core.target import Target
from hasten.kernels.modules import Input, QuantizedLinear
from hasten.kernels.prepared import PreparedLinear, prepare_weight
from hasten.kernels.rounding import quantize_integer
from hasten.quantize import HadamardRotation, Int8Linear
from hasten.quantize.engine.build import prepared_layer, quantized_layer
from hasten.quantize.engine.sites import Site, sites
from tests.contract.rigs import make, plain_output


def site(layer: nn.Linear | None = None) -> Site:
    parent = nn.ModuleDict({"q": layer or nn.Linear(64, 32)})
    return Site("denoiser", "blocks.0.q", parent, cast(nn.Linear, parent["q"]))


def within(outer: Site, module: PreparedLinear) -> Site:
    """The site as it is found once the layer has been put in the place."""
    return Site(outer.component, outer.path, outer.parent, module.linear, module)


def test_a_quantizer_takes_smoothing_and_rotation_over() -> None:
    plain, x = site(), torch.randn(5, 64)
    found = within(plain, prepared_layer(plain, smooth=torch.rand(64) + 0.5, rotation=16))
    made = quantized_layer(found, quantize_integer(found.weight, 8), Input(activations="int8"))
    assert (made.rotation, made.activations) == (16, "int8")
    assert made.smooth is cast(PreparedLinear, found.wrapper).smooth
    assert torch.allclose(made(x), plain.layer(x), atol=0.05)
    assert torch.allclose(made.weight, plain.weight, atol=0.01)


def test_a_quantizer_that_smooths_itself_starts_from_the_raw_weight() -> None:
    plain, x, smooth = site(), torch.randn(5, 64), torch.rand(64) + 0.5
    found = within(plain, prepared_layer(plain, rotation=16))
    assert torch.allclose(found.raw_weight, plain.weight, atol=1e-6)
    weight = quantize_integer(prepare_weight(found.raw_weight, smooth, 16), 8)
    made = quantized_layer(found, weight, Input(smooth=smooth, rotation=16))
    assert torch.allclose(made(x), plain.layer(x), atol=0.05)


def test_smoothing_and_rotation_add_up_in_any_order() -> None:
    plain, x, smooth = site(), torch.randn(5, 64), torch.rand(64) + 0.5
    once = within(plain, prepared_layer(plain, rotation=16))
    one = prepared_layer(once, smooth=smooth)
    other = prepared_layer(within(plain, prepared_layer(plain, smooth=smooth)), rotation=16)
    for module in (one, other):
        assert module.rotation == 16
        assert torch.equal(cast(torch.Tensor, module.smooth), smooth)
        assert torch.allclose(module(x), plain.layer(x), atol=1e-5)
    assert torch.allclose(one.linear.weight, other.linear.weight, atol=1e-6)
    with pytest.raises(HastenError, match="rotated already"):
        prepared_layer(once, rotation=8)


def places(rig: Any) -> dict[str, nn.Module]:
    return {f"{s.path}": s.present for s in sites(Target.of(rig), ("transformer", "unet"), ())}


def test_a_rotated_network_computes_the_same_and_has_the_same_sites() -> None:
    rig = make("flux")
    before = places(rig)
    with rig.accelerated(HadamardRotation()) as session:
        output = rig.run()
        after = places(rig)
        assert "rotated their inputs in 4 calls" in session.describe()
    assert after.keys() == before.keys()
    assert all(isinstance(module, PreparedLinear) for module in after.values())
    assert torch.allclose(output, plain_output("flux"), atol=1e-4, rtol=1e-3)
    assert places(rig) == before


def test_rotation_and_int8_in_one_recipe() -> None:
    rig = make("flux")
    with rig.accelerated(Int8Linear(), HadamardRotation(largest=16)) as session:
        modules = [module for module in rig.denoiser.modules() if isinstance(module, QuantizedLinear)]
        assert {module.rotation for module in modules} == {16}
        assert not [module for module in rig.denoiser.modules() if isinstance(module, PreparedLinear)]
        rig.run()
        assert "of them quantized" in session.describe()
        assert torch.allclose(rig.run(), plain_output("flux"), atol=0.5)


def test_sessions_can_be_nested() -> None:
    rig = make("dit")
    with rig.accelerated(HadamardRotation()):
        rotated = rig.run()
        with rig.accelerated(Int8Linear()):
            assert not torch.equal(rig.run(), rotated)
        assert torch.equal(rig.run(), rotated)
    assert torch.equal(rig.run(), plain_output("dit"))


def test_rotation_helps_where_a_channel_is_large() -> None:
    plain, x = site(nn.Linear(256, 32)), torch.randn(64, 256)
    x[:, 3] *= 100
    exact = plain.layer(x)
    rotated = within(plain, prepared_layer(plain, rotation=256))
    errors = [(Int8Linear().quantize(place)(x) - exact).square().mean().item() for place in (plain, rotated)]
    assert errors[1] < errors[0] / 10


def test_originals_that_are_dropped_are_for_good() -> None:
    rig = make("dit")
    with pytest.raises(HastenError, match="apply_permanently"):
        rig.accelerated(HadamardRotation(originals="drop"))
    layers = list(places(rig).values())
    hasten.apply_permanently(rig, HadamardRotation(originals="drop"))
    assert all(cast(nn.Linear, layer).weight.numel() == 0 for layer in layers)
    assert torch.allclose(rig.run(), plain_output("dit"), atol=1e-4, rtol=1e-3)
