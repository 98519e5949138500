"""ChannelsLast: NHWC weights and activations while it is on, and the very same strides afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.compilation import ChannelsLast
from hasten.core.errors import NotEngaged, Refused
from hasten.core.session import accelerate
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


def test_of_a_transformers_pipeline_only_the_vae_changes() -> None:
    rig = make("flux")
    before, denoiser = layout(rig.denoiser, rig.vae), layout(rig.denoiser)
    with rig.accelerated(NHWC) as session:
        assert [entry[:2] for entry in layout(rig.denoiser)] == [entry[:2] for entry in denoiser]
        assert all(c.weight.is_contiguous(memory_format=LAYOUT) for c in large_convolutions(rig.vae))
        rig.run()
        assert session.evidence()[NHWC].summary.startswith("activations in NHWC (vae: ")
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
