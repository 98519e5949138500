"""LPIPS against the published example, and its behaviour on noise and small images."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hasten.measure.lpips import MIN_SIDE, Lpips, enlarge, load_lpips, lpips_distance

DATA = Path(__file__).parent.parent / "data" / "lpips"


def example(name: str) -> Tensor:
    pixels = np.asarray(Image.open(DATA / f"{name}.png").convert("RGB"))
    return torch.tensor(pixels).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize(("distorted", "expected"), [("ex_p0", 0.7219), ("ex_p1", 0.1376)])
def test_reference_numbers_at_native_size(distorted: str, expected: float) -> None:
    distance = load_lpips()(example("ex_ref"), example(distorted))
    assert distance.item() == pytest.approx(expected, abs=5e-5)


def test_identical_images_are_at_distance_zero() -> None:
    image = example("ex_ref")
    assert lpips_distance(image, image).item() == 0.0


def test_distance_is_symmetric() -> None:
    left, right = example("ex_ref"), example("ex_p1")
    assert lpips_distance(left, right).item() == pytest.approx(lpips_distance(right, left).item(), rel=1e-5)


def test_pairs_of_a_batch_do_not_influence_each_other() -> None:
    left = torch.cat([example("ex_ref"), example("ex_ref"), example("ex_p0")])
    right = torch.cat([example("ex_p0"), example("ex_p1"), example("ex_p0")])
    alone = [lpips_distance(a[None], b[None]).item() for a, b in zip(left, right, strict=True)]
    assert lpips_distance(left, right).tolist() == pytest.approx(alone, rel=1e-4, abs=1e-6)


def test_small_images_are_enlarged_so_that_small_errors_count() -> None:
    image = example("ex_ref")
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)) * 4 / 255
    noisy = (image + noise).clamp(0, 1)
    native = load_lpips()(image, noisy).item()
    assert lpips_distance(image, noisy).item() > 2 * native
    assert lpips_distance(image, noisy).item() == pytest.approx(load_lpips()(enlarge(image), enlarge(noisy)).item())


@pytest.mark.parametrize(
    ("size", "expected"), [((64, 96), (128, 192)), ((128, 128), (128, 128)), ((300, 20), (1920, 128))]
)
def test_enlarge_keeps_the_aspect_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert tuple(enlarge(torch.zeros(1, 3, *size)).shape[-2:]) == expected
    assert min(expected) >= MIN_SIDE


def test_the_network_is_built_once_and_frozen() -> None:
    network = load_lpips()
    assert load_lpips() is network
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_untrained_weights_would_be_noticed() -> None:
    torch.manual_seed(0)
    untrained = Lpips()
    assert untrained(example("ex_ref"), example("ex_p0")).item() == 0.0


def test_the_notice_names_the_very_file() -> None:
    folder = files("hasten.measure") / "weights"
    digest = hashlib.sha256((folder / "lpips_alexnet.safetensors").read_bytes()).hexdigest()
    assert digest in (folder / "NOTICE.txt").read_text()
