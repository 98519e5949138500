"""BitsAndBytes: layers that compute what the library's do, and the library's own layers."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import pytest
import torch
from torch import nn

import hasten
from hasten.core.target import Target
from hasten.kernels.modules import Input, QuantizedLinear, part_channels
from hasten.kernels.rounding import quantize_integer
from hasten.quantize import BitsAndBytes, HadamardRotation
from hasten.quantize.engine.sites import Site, sites
from tests.contract.rigs import make, refusals

bnb: Any = pytest.importorskip("bitsandbytes.nn")


def site(layer: nn.Linear) -> Site:
    return Site("denoiser", "blocks.0.q", nn.ModuleDict({"q": layer}), layer)


def both(technique: dict[str, Any], x: torch.Tensor) -> list[torch.Tensor]:
    """What hasten's layer and the library's make of one weight and input."""
    torch.manual_seed(0)
    place = site(nn.Linear(128, 64).to(x.dtype))
    ours = BitsAndBytes(**technique).quantize(place)
    theirs = BitsAndBytes(**technique, backend="library").quantize(place)
    assert isinstance(ours, QuantizedLinear)
    assert type(theirs).__module__.startswith("bitsandbytes")
    with torch.no_grad():
        return [ours(x), theirs(x), place.layer(x)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_4_bits_compute_what_the_library_computes(quant_type: str, double_quant: bool) -> None:
    ours, theirs, plain = both({"quant_type": quant_type, "double_quant": double_quant}, torch.randn(2, 9, 128))
    error = (ours - plain).norm()
    # On CPUs that multiply bfloat16 the library rounds scales to that.
    assert (ours - theirs).norm() < 0.05 * error
    assert error < 0.2 * plain.norm()


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_8_bits_compute_what_the_library_computes(threshold: float) -> None:
    x = torch.randn(2, 9, 128)
    x[..., 5] *= 20
    ours, theirs, plain = both({"bits": 8, "threshold": threshold}, x)
    assert (ours - theirs).norm() < 0.01 * plain.norm()
    assert (ours - plain).norm() < (0.03 if threshold else 0.08) * plain.norm()


def test_channels_with_large_numbers_are_not_rounded() -> None:
    weight, x = quantize_integer(torch.randn(16, 32), 8), torch.randn(7, 32)
    x[3, 4] = 500.0
    exact = nn.functional.linear(x, weight.dequantize())
    errors = [
        (QuantizedLinear(weight, given=Input(activations="int8", threshold=t))(x) - exact).norm() for t in (0.0, 6.0)
    ]
    assert errors[1] < errors[0] / 5
    small, large = part_channels(x, 6.0)
    assert torch.equal(small + large, x)
    assert large.any(0).nonzero().flatten().tolist() == [4]
    assert not small[:, 4].any()


def test_the_type_in_which_it_computes() -> None:
    place, x = site(nn.Linear(64, 32).bfloat16()), torch.randn(5, 64).bfloat16()
    for name in ("auto", "float32"):
        module = BitsAndBytes(compute_dtype=name).quantize(place)  # pyright: ignore[reportArgumentType]
        assert module(x).dtype == torch.bfloat16
    auto, wide = (BitsAndBytes(compute_dtype=n).quantize(place) for n in ("auto", "float32"))
    assert not torch.equal(auto(x), wide(x))
    exact = cast(QuantizedLinear, wide).quantized.dequantize()
    expected = nn.functional.linear(x.float(), exact, cast(nn.Linear, place.layer).bias.float())
    assert torch.equal(wide(x), expected.bfloat16())


def test_modules_that_are_skipped() -> None:
    target = Target.of(make("flux"))
    paths = [found.path for found in BitsAndBytes().takes(target)]
    assert [found.path for found in sites(target, ("transformer",), ())] == paths
    left = [found.path for found in BitsAndBytes(skip_modules=("to_q", "single_transformer_blocks")).takes(target)]
    assert left == [p for p in paths if not p.endswith(".to_q") and not p.startswith("single_")] != paths
    assert len(BitsAndBytes(skip_modules=("transformer_blocks.1",)).takes(target)) < len(paths)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_library_in_a_network(bits: int) -> None:
    network = nn.Module()
    network.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))])
    network.forward = lambda x: network.blocks[0](x)  # pyright: ignore
    x = torch.randn(5, 64)
    technique = BitsAndBytes(bits=bits, backend="library")  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        plain = network(x)
        with hasten.accelerate(network, technique | HadamardRotation()) as session:
            output = network(x)
            text = session.describe()
            assert "2 weights of 0.03 MiB" in text
            assert "took part in 1 calls" in text
            assert "of them quantized" in text
        assert (output - plain).norm() < 0.2 * plain.norm()
        assert not torch.equal(output, plain)
        assert torch.equal(network(x), plain)


def test_what_the_library_cannot_do_on_a_cpu() -> None:
    assert any("64 divides" in reason for reason in refusals(BitsAndBytes(backend="library"), make("dit")))
    assert not refusals(BitsAndBytes(bits=8, backend="library"), make("dit"))


def test_a_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    assert any("pip install" in reason for reason in refusals(BitsAndBytes(backend="library"), make("dit")))
    assert not refusals(BitsAndBytes(), make("dit"))
