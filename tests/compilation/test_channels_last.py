"""ChannelsLast: NHWC weights and activations while it is on, and the very same strides afterwards."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from hasten.compilation import ChannelsLast, CompileBlocks
from hasten.compilation.layout import counted, layout_of
from hasten.core.errors import NotEngaged, Refused
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from hasten.core.target import Target
from tests.contract.rigs import Rig, make, plain_output

NHWC = ChannelsLast()
LAYOUT = torch.channels_last


def large_convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]


def layout(*networks: nn.Module) -> list[tuple[int, tuple[int, ...], torch.Tensor]]:
    return [(id(p), p.stride(), p.detach().clone()) for network in networks for p in network.parameters()]


def restored(rig: Rig, before: list[tuple[int, tuple[int, ...], torch.Tensor]]) -> bool:
    after = layout(rig.denoiser, rig.vae)
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("architecture", ["stable_diffusion", "sdxl"])
def test_weights_and_activations_of_a_unet(architecture: str) -> None:
    rig = make(architecture)
    before, seen = layout(rig.denoiser, rig.vae), list[bool]()
    convolutions = large_convolutions(rig.denoiser)
    assert convolutions
    for convolution in convolutions:
        convolution.register_forward_hook(lambda _, __, out: seen.append(out.is_contiguous(memory_format=LAYOUT)))
    with rig.accelerated(NHWC) as session:
        assert all(c.weight.is_contiguous(memory_format=LAYOUT) for c in convolutions + large_convolutions(rig.vae))
        output = rig.run()
        assert seen
        assert all(seen)
        summary = session.evidence()[NHWC].summary
    assert "unet: " in summary
    assert "vae: " in summary
    torch.testing.assert_close(output, plain_output(architecture), atol=1e-4, rtol=1e-3)
    assert restored(rig, before)
    assert torch.equal(rig.run(), plain_output(architecture))


@pytest.mark.parametrize("architecture", ["stable_diffusion", "sdxl"])
def test_one_layout_copy_remains_where_the_latents_enter(architecture: str) -> None:
    rig = make(architecture)
    stages = len(list(Target.of(rig).denoisers[0].of_class("Transformer2DModel")))
    given: Any = rig.spec.example(rig.denoiser.config, InputSize(batch=2))  # pyright: ignore
    before = counted(lambda: rig.denoiser(**given))
    assert before.nhwc == 0
    assert before.copies == {"clone": stages}, "each attention stage copies its output to NCHW"
    with rig.accelerated(NHWC) as session:
        rig.run(steps=1)
        summary = session.evidence()[NHWC].summary
    weights = len(large_convolutions(rig.denoiser))
    assert f"unet: {weights} of {weights} convolution weights and " in summary
    unet, vae = summary.split("; ")
    made, all_made = map(int, re.findall(r"(\d+) of (\d+) activations in NHWC", unet)[0])
    assert made == all_made == before.other - stages
    for part in (unet, vae):
        assert part.endswith("layout copies that remain: 1 (1 by convolution)")


def test_a_layout_copy_inside_is_counted() -> None:
    rig = make("stable_diffusion")
    inner = large_convolutions(rig.denoiser)[3]
    with rig.accelerated(NHWC) as session:
        inner.register_forward_hook(lambda _, __, out: out.contiguous())
        rig.run(steps=1)
        unet = session.evidence()[NHWC].summary.split("; ")[0]
    made, all_made = map(int, re.findall(r"(\d+) of (\d+) activations in NHWC", unet)[0])
    assert made < all_made
    assert "by clone" in unet


def test_layouts_by_strides() -> None:
    picture = torch.zeros(2, 3, 4, 5)
    assert layout_of(picture) == "NCHW"
    assert layout_of(picture.contiguous(memory_format=LAYOUT)) == "NHWC"
    assert layout_of(picture.permute(0, 2, 3, 1)) == "NCHW seen as tokens"
    assert layout_of(picture[:, :2]) == layout_of(torch.zeros(2, 1, 4, 5)) == layout_of(torch.zeros(2, 3)) == ""
    assert layout_of(torch.zeros(1, 3, 4, 5).contiguous(memory_format=LAYOUT)) == "NHWC"


def test_compiled_and_observed_at_once() -> None:
    rig, compiled = make("stable_diffusion"), CompileBlocks(backend="eager")
    with rig.accelerated(NHWC, compiled) as session:
        output = rig.run()
        assert all(evidence.summary for evidence in session.evidence().values())
    torch.testing.assert_close(output, plain_output("stable_diffusion"), atol=1e-4, rtol=1e-3)


def test_of_a_transformers_pipeline_only_the_vae_changes() -> None:
    rig = make("flux")
    before, denoiser = layout(rig.denoiser, rig.vae), layout(rig.denoiser)
    with rig.accelerated(NHWC) as session:
        assert [entry[:2] for entry in layout(rig.denoiser)] == [entry[:2] for entry in denoiser]
        assert all(c.weight.is_contiguous(memory_format=LAYOUT) for c in large_convolutions(rig.vae))
        rig.run()
        assert session.evidence()[NHWC].summary.startswith("vae: ")
        assert {change.where.partition(".")[0] for change in session.log(NHWC)} == {"vae"}
    assert restored(rig, before)


def test_strides_that_are_neither_come_back_as_well() -> None:
    rig = make("stable_diffusion")
    convolution = large_convolutions(rig.denoiser)[0]
    odd = torch.randn(*reversed(convolution.weight.shape)).permute(3, 2, 1, 0)
    convolution.weight = nn.Parameter(odd)
    before = layout(rig.denoiser, rig.vae)
    assert not convolution.weight.is_contiguous()
    with rig.accelerated(NHWC):
        assert convolution.weight.is_contiguous(memory_format=LAYOUT)
        rig.run()
    assert restored(rig, before)
    assert torch.equal(convolution.weight, odd)


def test_a_model_that_is_nhwc_already_stays_so() -> None:
    rig = make("stable_diffusion")
    unet: Any = rig.denoiser
    unet.to(memory_format=LAYOUT)
    before = layout(rig.denoiser, rig.vae)
    with rig.accelerated(NHWC) as session:
        rig.run()
        assert session.evidence()
    assert restored(rig, before)


def test_strides_come_back_after_an_exception() -> None:
    rig = make("stable_diffusion")
    before = layout(rig.denoiser, rig.vae)
    with pytest.raises(InterruptedError), rig.accelerated(NHWC):
        rig.run(stop_at=1)
    assert restored(rig, before)


def test_weights_changed_inside_keep_their_new_values() -> None:
    rig = make("stable_diffusion")
    weight = large_convolutions(rig.denoiser)[0].weight
    strides, value = weight.stride(), weight.detach().clone()
    with torch.no_grad(), rig.accelerated(NHWC):
        weight.mul_(2)
    assert weight.stride() == strides
    assert torch.equal(weight, value * 2)


def test_a_pipeline_without_convolutions_is_refused() -> None:
    rig: Any = make("dit")
    with pytest.raises(Refused, match="DiTTransformer2DModel has neither a U-Net nor an image VAE"):
        accelerate(rig.denoiser, NHWC)
    assert not list(NHWC.problems(Target.of(rig)))


def test_without_a_run_there_is_no_evidence() -> None:
    rig = make("stable_diffusion")
    with rig.accelerated(NHWC) as session, pytest.raises(NotEngaged, match="no convolution ran"):
        session.evidence()
