"""Noise levels and conversions between what denoisers predict: each against its definition."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.core.errors import HastenError
from hasten.core.noise import NoiseLevel, Prediction, convert, mixing

KINDS: tuple[Prediction, ...] = get_args(Prediction)
AMOUNTS = st.floats(1e-3, 1)
HALF = NoiseLevel(0.6, 0.8)


def picture_and_noise(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, *(shape or (2, 3, 4, 4)), generator=generator, dtype=torch.float64)
    return clean, noise


def predicted(kind: Prediction, level: NoiseLevel, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What a denoiser that is always right answers, by the definition of each form."""
    return {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": level.alpha * noise - level.sigma * clean,
        "flow_prediction": noise - clean,
    }[kind]


@pytest.mark.parametrize(("given", "wanted"), itertools.product(KINDS, KINDS))
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(alpha=AMOUNTS, sigma=AMOUNTS)
def test_every_form_becomes_every_other(given: Prediction, wanted: Prediction, alpha: float, sigma: float) -> None:
    level, (clean, noise) = NoiseLevel(alpha, sigma), picture_and_noise()
    seen = alpha * clean + sigma * noise
    result = convert(predicted(given, level, clean, noise), seen, level, given, wanted)
    torch.testing.assert_close(result, predicted(wanted, level, clean, noise), rtol=1e-9, atol=1e-9)
    back = convert(result, seen, level, wanted, given)
    torch.testing.assert_close(back, predicted(given, level, clean, noise), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [NoiseLevel(0, 1), NoiseLevel(1, 0), NoiseLevel(1e-30, 1), NoiseLevel(1, 1e-30)])
@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize("wanted", KINDS)
def test_velocities_are_safe_at_both_ends(level: NoiseLevel, kind: Prediction, wanted: Prediction) -> None:
    clean, noise = picture_and_noise()
    seen = level.alpha * clean + level.sigma * noise
    result = convert(predicted(kind, level, clean, noise), seen, level, kind, wanted)
    torch.testing.assert_close(result, predicted(wanted, level, clean, noise))


def test_what_cannot_be_known_is_said() -> None:
    seen = torch.ones(1, 3, 2, 2)
    with pytest.raises(HastenError, match=r"'epsilon' says nothing about 'flow_prediction' where alpha = 0"):
        convert(seen, seen, NoiseLevel(0, 1), "epsilon", "flow_prediction")
    with pytest.raises(HastenError, match=r"'sample' says nothing about 'epsilon' where alpha = 1 and sigma = 0"):
        convert(seen, seen, NoiseLevel(1, 0), "sample", "epsilon")


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_is_always_known_to_itself(kind: Prediction) -> None:
    seen = torch.ones(1, 3, 2, 2)
    for level in (NoiseLevel(0, 1), NoiseLevel(1, 0)):
        assert convert(seen, seen * 2, level, kind, kind) is seen
        assert mixing(level, kind, kind) == (1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_type_is_kept_and_the_sum_is_exact_enough(dtype: torch.dtype) -> None:
    level = NoiseLevel(0.01, 0.99995)
    clean, noise = picture_and_noise()
    velocity, seen = (noise - clean).to(dtype), (level.alpha * clean + level.sigma * noise).to(dtype)
    result = convert(velocity, seen, level, "flow_prediction", "sample")
    by_hand = (seen.double() - level.sigma * velocity.double()) / level.scale
    assert result.dtype == dtype
    # Sums of intermediate results that were rounded to 16 bits would be off by far more than the last rounding.
    torch.testing.assert_close(result.double(), by_hand, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_learned_variances_pass_through() -> None:
    clean, noise = picture_and_noise()
    variances = torch.full_like(noise, 7.0)
    seen = HALF.alpha * clean + HALF.sigma * noise
    result = convert(torch.cat((noise, variances), 1), seen, HALF, "epsilon", "flow_prediction")
    torch.testing.assert_close(result[:, :3], noise - clean)
    assert torch.equal(result[:, 3:], variances)


@pytest.mark.parametrize(
    ("shape", "dimension"), [((2, 3, 4, 4), 1), ((2, 6, 3), 2), ((2, 6, 3), 1), ((1, 3, 2, 4, 4), 1)]
)
def test_mask_and_masked_picture_are_ignored(shape: tuple[int, ...], dimension: int) -> None:
    clean, noise = picture_and_noise(*shape)
    seen = torch.cat((HALF.alpha * clean + HALF.sigma * noise, torch.full_like(noise, math.nan)), dimension)
    torch.testing.assert_close(convert(noise, seen, HALF, "epsilon", "sample"), clean)


@pytest.mark.parametrize("other", [(3, 3, 4, 4), (2, 5, 4, 5), (2, 3, 4), (2, 3, 4, 4, 1)])
def test_shapes_that_do_not_fit_are_refused(other: tuple[int, ...]) -> None:
    with pytest.raises(HastenError, match=r"\(2, 3, 4, 4\) does not belong to an input"):
        convert(torch.ones(2, 3, 4, 4), torch.ones(other), HALF, "epsilon", "sample")


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(alpha=AMOUNTS, sigma=AMOUNTS)
def test_the_measures_of_a_level(alpha: float, sigma: float) -> None:
    level = NoiseLevel(alpha, sigma)
    assert math.tan(level.angle) == pytest.approx(sigma / alpha)
    assert math.exp(level.log_snr) == pytest.approx(alpha / sigma)
    assert level.flow_time / (1 - level.flow_time) == pytest.approx(sigma / alpha)


def test_the_measures_at_both_ends() -> None:
    pure, clean = NoiseLevel(0, 1), NoiseLevel(1, 0)
    assert (pure.flow_time, pure.angle, pure.log_snr) == (1, math.pi / 2, -math.inf)
    assert (clean.flow_time, clean.angle, clean.log_snr) == (0, 0, math.inf)


@pytest.mark.parametrize("amounts", [(0, 0), (-0.1, 1), (1, math.nan), (math.inf, 0)])
def test_impossible_levels_are_refused(amounts: tuple[float, float]) -> None:
    with pytest.raises(HastenError, match="two finite amounts"):
        NoiseLevel(*amounts)
