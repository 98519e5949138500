"""Layers that are trained: gradients through rounding, adapters beside codes, and what is saved of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hasten.core.errors import HastenError
from hasten.core.patch import Patch
from hasten.kernels.modules import Quantized
from hasten.kernels.rounding import quantize_integer
from hasten.quantize import Int8Linear, LoRA, WeightOnly
from hasten.quantize.engine.linear_quantizer import LinearQuantizer
from hasten.quantize.engine.sites import Site
from hasten.quantize.training.straight_through import StraightThrough
from hasten.quantize.training.trainable import TrainedAdapters, TrainedWeights, error_in_ranks
from hasten.search.finetune.optimizer import optimizer
from tests.contract.rigs import Rig, make


def place(layer: nn.Linear | nn.Conv2d) -> Site:
    return Site("transformer", "blocks.0", nn.Sequential(layer), layer)


def patch() -> Patch:
    return Patch({}, lambda: pytest.fail("no clock"))


@pytest.mark.parametrize("technique", [WeightOnly(bits=3, group=8), Int8Linear()], ids=repr)
@pytest.mark.parametrize("conv", [False, True])
def test_outputs_are_rounded_and_gradients_are_not(technique: LinearQuantizer, conv: bool) -> None:
    torch.manual_seed(0)
    site = place(nn.Conv2d(16, 24, 1) if conv else nn.Linear(16, 24))
    module = cast(Quantized, technique.quantize(site))
    layer = StraightThrough(site, module, technique.quantize)
    x = torch.randn(3, 16, 4, 4) if conv else torch.randn(5, 16)
    found = layer(x)
    assert torch.equal(found, module(x))
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    plain = site.weight.clone().requires_grad_()
    product = F.conv2d(x, plain) if conv else F.linear(x, plain)
    (product * weights).sum().backward()
    torch.testing.assert_close(layer.master.grad, plain.grad)


def test_codes_follow_the_weight() -> None:
    torch.manual_seed(0)
    technique, site = WeightOnly(bits=4, group=8), place(nn.Linear(16, 24))
    layer = StraightThrough(site, technique.quantize(site), technique.quantize)
    with torch.no_grad():
        layer.master.copy_(torch.randn(24, 16))
    exported = layer.round()
    expected = quantize_integer(layer.master, 4, 8, symmetric=False, scales=torch.float16)
    assert torch.equal(exported.dequantize(), expected.dequantize())
    torch.testing.assert_close(layer(torch.eye(16)) - layer.base_layer.bias, expected.dequantize().T)


def test_the_error_in_ranks_is_the_best_approximation() -> None:
    torch.manual_seed(0)
    site = place(nn.Linear(32, 48))
    module = WeightOnly(bits=2, group=8).quantize(site)
    error = site.weight - module.effective()
    found = error_in_ranks(site.weight, module, 8)
    left = float((error - found.up @ found.down).norm())
    best = float(torch.linalg.svdvals(error)[8:].norm())
    assert best - 1e-5 <= left < 1.02 * best
    assert error_in_ranks(site.weight, module, 1000).down.shape == (32, 32)


def replaced(rig: Rig, quantizer: LinearQuantizer) -> tuple[Any, list[Any]]:
    from hasten.search.finetune.recover import quantized_layers

    session = rig.accelerated(quantizer)
    return session, list(quantized_layers(session))


def test_trained_adapters_are_saved_as_lora_reads_them(tmp_path: Path) -> None:
    rig, quantizer = make("stable_diffusion"), WeightOnly(bits=3)
    changes = patch()
    session, layers = replaced(rig, quantizer)
    with session, torch.no_grad():
        untrained = rig.run(steps=2)
        trained = TrainedAdapters(layers, 4, changes)
        for matrix in trained.parameters():
            matrix += 0.05 * torch.randn_like(matrix)
        expected = rig.run(steps=2)
        file = trained.save(tmp_path / "tuned.safetensors")
        changes.close()
        assert torch.equal(rig.run(steps=2), untrained)
    with rig.accelerated(quantizer, LoRA(adapters=(str(file),))):
        torch.testing.assert_close(rig.run(steps=2), expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(expected, untrained, atol=1e-2)


def test_gradients_reach_adapters_through_frozen_codes() -> None:
    rig, changes = make("flux"), patch()
    session, layers = replaced(rig, Int8Linear())
    with session:
        trained = TrainedAdapters(layers, 2, changes)
        given = rig.spec.example(rig.denoiser.config)  # pyright: ignore
        rig.denoiser(**given, return_dict=False)[0].square().sum().backward()
        grads = [matrix.grad for matrix in trained.parameters()]
        changes.close()
    assert len(grads) == 2 * len(layers) > 20
    # The last block drops its text stream, so that a few layers have no part in the output.
    assert sum(grad is not None and bool(grad.abs().sum() > 0) for grad in grads) > 0.8 * len(grads)


def test_weights_of_layers_that_are_not_the_models_are_refused() -> None:
    rig = make("flux")
    session, layers = replaced(rig, Int8Linear())
    with session, pytest.raises(HastenError, match="one that another technique has made"):
        TrainedWeights(layers, {"transformer": []}, patch())
    assert not any(isinstance(module, Quantized) for module in rig.denoiser.modules())


def test_adam_with_a_state_of_8_bits() -> None:
    pytest.importorskip("bitsandbytes")
    weight = nn.Parameter(torch.ones(64, 128))
    steps = optimizer("adamw8bit", [weight], torch.device("cpu"))
    for group in steps.param_groups:
        group["lr"] = 0.1
    for _ in range(5):
        steps.zero_grad()
        weight.square().sum().backward()
        steps.step()
    assert float(weight.detach().max()) < 0.7
    assert steps.state[weight]["state1"].dtype == torch.uint8
    assert type(optimizer("auto", [weight], torch.device("cpu"))) is torch.optim.AdamW
