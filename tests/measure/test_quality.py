"""Fidelity: identity, monotony with noise, averaging, wording, and what happens with bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hasten.core.errors import BrokenOutput, HastenError
from hasten.measure.quality import (
    Fidelity,
    describe_difference,
    fidelities,
    fidelity,
    finite_or_none,
    mean_fidelity,
    noise_floor,
)

PERFECT = Fidelity(psnr=math.inf, ssim=1.0, lpips=0.0)


def drawing(side: int = 64, width: int | None = None) -> Tensor:
    """A disc on a gradient: flat areas, an edge and a slope. Float [3, H, W] in [0, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, width or side), indexing="ij")
    disc = (x.square() + y.square() < 0.5).float()
    return torch.stack([disc, (x + 1) / 2, 0.8 * (1 - disc) + 0.1])


def noisy(image: Tensor, level: float, seed: int = 0) -> Tensor:
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return (image + noise * level).clamp(0, 1)


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_identical_images() -> None:
    found = fidelity(drawing(), drawing())
    assert found.psnr == math.inf
    assert found.ssim == 1.0
    assert found.lpips == 0.0


def test_every_measure_falls_with_noise() -> None:
    image = drawing()
    found = [fidelity(noisy(image, level / 255), image) for level in (1, 4, 16, 64)]
    assert [one.psnr for one in found] == sorted((one.psnr for one in found), reverse=True)
    assert [one.ssim for one in found] == sorted((one.ssim for one in found), reverse=True)
    assert [one.lpips for one in found] == sorted(one.lpips for one in found)


def test_psnr_has_a_data_range_of_one() -> None:
    image = torch.full((3, 32, 32), 0.5)
    assert fidelity(image + 0.1, image).psnr == pytest.approx(20.0, abs=1e-3)


def test_ssim_follows_its_definition() -> None:
    """For constant images only the luminance term is left: (2ab + c) / (a^2 + b^2 + c), c = 0.0001."""
    found = fidelity(torch.full((3, 32, 32), 0.6), torch.full((3, 32, 32), 0.5))
    assert found.ssim == pytest.approx((2 * 0.6 * 0.5 + 1e-4) / (0.36 + 0.25 + 1e-4), abs=1e-4)


def test_pil_uint8_and_float_images_agree() -> None:
    image, other = as_pil(drawing()), as_pil(noisy(drawing(), 0.05))

    def bytes_of(picture: Image.Image) -> Tensor:
        return torch.tensor(np.asarray(picture)).permute(2, 0, 1)

    expected = fidelity(image, other)
    assert fidelity(bytes_of(image), bytes_of(other)) == expected
    assert fidelity(bytes_of(image) / 255, other) == expected


def test_a_half_precision_tensor_is_accepted() -> None:
    assert fidelity(drawing().half(), drawing()).psnr > 60


def test_fidelities_keep_the_order_of_mixed_sizes() -> None:
    images = [drawing(64), drawing(32), drawing(64), drawing(40, 24)]
    levels = [0.2, 0.1, 0.02, 0.0]
    changed = [noisy(image, level) for image, level in zip(images, levels, strict=True)]
    alone = [fidelity(a, b) for a, b in zip(changed, images, strict=True)]
    for found, expected in zip(fidelities(changed, images), alone, strict=True):
        assert found.psnr == pytest.approx(expected.psnr)
        assert found.lpips == pytest.approx(expected.lpips, rel=1e-4, abs=1e-6)
    assert alone[3].psnr == math.inf


def test_mean_is_the_mean_of_the_pairs() -> None:
    image = drawing()
    changed = [noisy(image, 0.01), noisy(image, 0.1)]
    first, second = (fidelity(one, image) for one in changed)
    mean = mean_fidelity(changed, [image, image])
    assert mean.psnr == pytest.approx((first.psnr + second.psnr) / 2)
    assert mean.ssim == pytest.approx((first.ssim + second.ssim) / 2)
    assert mean.lpips == pytest.approx((first.lpips + second.lpips) / 2, rel=1e-4)


def test_one_identical_pair_does_not_hide_a_bad_one() -> None:
    image, changed = drawing(), noisy(drawing(), 0.1)
    mean = mean_fidelity([image, changed], [image, image])
    assert mean.psnr == pytest.approx(fidelity(changed, image).psnr)
    assert mean_fidelity([image], [image]).psnr == math.inf


def test_the_resolution_of_lpips_is_reported() -> None:
    assert fidelity(drawing(32), drawing(32)).lpips_resolution == 128
    assert fidelity(drawing(160, 200), drawing(160, 200)).lpips_resolution == 160


def test_to_dict_survives_strict_json() -> None:
    written = json.dumps(PERFECT.to_dict(), allow_nan=False)
    assert json.loads(written) == {"psnr": None, "ssim": 1.0, "lpips": 0.0, "lpips_resolution": 128}
    assert finite_or_none(math.nan) is None
    assert finite_or_none(31.5) == 31.5


@pytest.mark.parametrize(("left", "right"), [((48, 32), (64, 64)), ((64, 64), (48, 32))])
def test_a_size_mismatch_names_both_sizes(left: tuple[int, int], right: tuple[int, int]) -> None:
    with pytest.raises(HastenError, match=r"(32x48.*64x64)|(64x64.*32x48)"):
        fidelity(drawing(*left), drawing(*right))


@pytest.mark.parametrize("side", ["image", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused_and_counted(side: str, value: float) -> None:
    broken = drawing()
    broken[0, :2, 0] = value
    pair = (broken, drawing()) if side == "image" else (drawing(), broken)
    with pytest.raises(BrokenOutput, match=rf"{side} 0 has 2 values"):
        fidelity(*pair)


def test_lists_must_be_non_empty_and_equally_long() -> None:
    with pytest.raises(HastenError, match="at least one image"):
        mean_fidelity([], [])
    with pytest.raises(HastenError, match=r"1 images .* 2 references"):
        mean_fidelity([drawing()], [drawing(), drawing()])


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (torch.zeros(64, 64, 3), r"shape \[64, 64, 3\]"),
        (torch.zeros(1, 3, 64, 64), r"shape \[1, 3, 64, 64\]"),
        (torch.zeros(3, 64, 8), "at least 11 px"),
        (drawing() * 2 - 1, r"from -1 to 1; .* in \[0, 1\]"),
        (drawing() * 255, r"to 255; .* in \[0, 1\]"),
    ],
)
def test_unusable_images_are_refused(image: Tensor, expected: str) -> None:
    with pytest.raises(HastenError, match=expected):
        fidelity(image, image)


def test_a_difference_under_the_noise_floor_is_none() -> None:
    image = drawing()
    floor = noise_floor([noisy(image, 0.002)], [image])
    assert describe_difference(noise_floor([noisy(image, 0.001)], [image]), floor) == "none"
    assert describe_difference(noise_floor([noisy(image, 0.004)], [image]), floor) != "none"
    assert describe_difference(floor, floor) == "none"


def test_without_a_floor_only_identity_is_none() -> None:
    assert describe_difference(PERFECT) == "none"
    assert describe_difference(Fidelity(psnr=90.0, ssim=1.0, lpips=0.0)) == "invisible"


@pytest.mark.parametrize(
    ("psnr", "lpips", "word"),
    [(45, 0.005, "invisible"), (45, 0.02, "slight"), (35, 0.005, "slight"), (25, 0.2, "visible"),
     (25, 0.3, "strong"), (12, 0.01, "strong")],
)  # fmt: skip
def test_the_worse_measure_decides_the_word(psnr: float, lpips: float, word: str) -> None:
    assert describe_difference(Fidelity(psnr=psnr, ssim=0.9, lpips=lpips), PERFECT) == word


def test_importing_the_module_does_not_import_torchmetrics() -> None:
    code = "import sys, hasten.measure.quality; print('torchmetrics' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
