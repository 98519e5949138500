"""VaeTiling and VaeSlicing: the VAE's own switches, taken back, with evidence that they cut something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from hasten.core.errors import HastenError, InvalidSetting, NotEngaged
from hasten.core.session import accelerate
from hasten.memory import VaeSlicing, VaeTiling
from tests.contract.rigs import make


@pytest.fixture
def rig() -> Any:
    return make("stable_diffusion")


def latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def decoded(rig: Any, z: torch.Tensor) -> torch.Tensor:
    return rig.vae.decode(z, return_dict=False)[0]


def test_tiles_are_those_of_the_vae_itself_at_that_size(rig: Any) -> None:
    z = latents(1, 4, 20, 12)
    by_hand = make("stable_diffusion")
    vae: Any = by_hand.vae
    vae.tile_sample_min_size = vae.tile_latent_min_size = 8
    vae.enable_tiling()
    plain = decoded(rig, z)
    with accelerate(rig, VaeTiling(tile=8)) as session:
        tiled = decoded(rig, z)
        assert session.evidence()[VaeTiling(tile=8)].summary == "1 of 1 pictures or batches were decoded in tiles"
    assert torch.equal(tiled, decoded(by_hand, z))
    assert not torch.equal(tiled, plain)
    assert torch.equal(decoded(rig, z), plain)


def test_a_picture_that_fits_a_tile_is_no_evidence(rig: Any) -> None:
    technique = VaeTiling(tile=64)
    with accelerate(rig, technique) as session:
        plain = decoded(rig, latents(1, 4, 8, 8))
        with pytest.raises(NotEngaged, match=r"no picture was larger than a tile\."):
            technique.engaged(session)
    assert torch.equal(decoded(rig, latents(1, 4, 8, 8)), plain)


def test_slices_equal_the_pictures_alone(rig: Any) -> None:
    z = latents(3, 4, 8, 8)
    with accelerate(rig, VaeSlicing()) as session:
        sliced = decoded(rig, z)
        alone = torch.cat([decoded(rig, one) for one in z.split(1)])
        assert session.evidence()[VaeSlicing()].summary == "1 of 4 batches were decoded one picture at a time"
    assert torch.equal(sliced, alone)
    assert not rig.vae.use_slicing


def test_a_switch_that_was_on_stays_on(rig: Any) -> None:
    rig.vae.enable_tiling()
    rig.vae.enable_slicing()
    size = rig.vae.tile_latent_min_size
    with accelerate(rig, VaeTiling(tile=8) | VaeSlicing()):
        assert rig.vae.tile_latent_min_size == 8
    assert rig.vae.use_tiling
    assert rig.vae.use_slicing
    assert rig.vae.tile_latent_min_size == size


def test_video_vaes_get_sides_and_strides() -> None:
    from hasten.memory.vae_tiling import _sizes  # pyright: ignore[reportPrivateUsage]

    class Video:
        tile_sample_min_height = tile_sample_min_width = 256

    found = _sizes(Video(), 64)
    assert found == {
        "tile_sample_min_height": 64,
        "tile_sample_min_width": 64,
        "tile_sample_stride_height": 48,
        "tile_sample_stride_width": 48,
    }


def test_tiles_follow_the_scale_of_the_vae() -> None:
    from hasten.memory.vae_tiling import _sizes  # pyright: ignore[reportPrivateUsage]

    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    widths = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "sample_size": 512}
    vae = AutoencoderKL(**widths, down_block_types=down, up_block_types=up)  # pyright: ignore
    assert _sizes(vae, 256) == {"tile_sample_min_size": 256, "tile_latent_min_size": 32}


def test_what_cannot_be_cut_is_refused(rig: Any) -> None:
    rig.vae = rig.components["vae"] = torch.nn.Linear(2, 2)
    for technique in (VaeTiling(), VaeSlicing()):
        with pytest.raises(HastenError, match="Linear cannot decode"), accelerate(rig, technique):
            pass
    with pytest.raises(InvalidSetting, match="at least 4"):
        VaeTiling(tile=1)
