"""Noise levels, and what a denoiser predicts, in coordinates in which every deterministic sampler is simple.

A denoiser's input is x = alpha*x0 + sigma*noise. With the flow time s = sigma/(alpha+sigma) and the rescaled input
xh = x/(alpha+sigma) = (1-s)*x0 + s*noise, the velocity is u = noise - x0, and DDIM (eta 0; Song et al. 2021, section
4), Euler on the probability-flow ODE (Karras et al. 2022, algorithm 1 without churn) and Euler on a rectified flow
(Liu et al. 2022) all are one formula: xh' = xh + (s' - s)*u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from hasten.core.errors import HastenError

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""What a denoiser predicts, in diffusers' words: noise, alpha*noise - sigma*x0, x0, or noise - x0."""


@dataclass(frozen=True)
class NoiseLevel:
    """How much picture (`alpha`) and noise (`sigma`) a denoiser's input holds; host floats, no units.

    Raises HastenError for a negative, infinite or missing amount, and when there is neither picture nor noise.
    """

    alpha: float
    sigma: float

    def __post_init__(self) -> None:
        amounts = (self.alpha, self.sigma)
        if not all(math.isfinite(amount) and amount >= 0 for amount in amounts) or not any(amounts):
            raise HastenError(f"A noise level needs two finite amounts of at least 0, not both 0; got {amounts}.")

    @property
    def scale(self) -> float:
        """alpha + sigma: the divisor that turns a denoiser's input into xh."""
        return self.alpha + self.sigma

    @property
    def flow_time(self) -> float:
        """s = sigma/(alpha+sigma): from 1 for pure noise to 0 for the finished picture."""
        return self.sigma / self.scale

    @property
    def angle(self) -> float:
        """The angle whose tangent is sigma/alpha, in radians: from pi/2 for pure noise to 0."""
        return math.atan2(self.sigma, self.alpha)

    @property
    def log_snr(self) -> float:
        """log(alpha/sigma), half the logarithm of the signal-to-noise ratio; -inf for pure noise, inf for none."""
        if not self.alpha or not self.sigma:
            return math.inf if self.alpha else -math.inf
        return math.log(self.alpha) - math.log(self.sigma)


def convert(
    output: torch.Tensor, network_input: torch.Tensor, level: NoiseLevel, given: Prediction, wanted: Prediction
) -> torch.Tensor:
    """Express a prediction `given` in one form in the form `wanted`, computed in float32 (float64 if it came so).

    `output` and `network_input` (shape of `output`) may differ in one dimension other than the first: what the output
    has more (learned variances) passes through, what the input has more (mask, masked picture) is ignored. Shape and
    dtype of `output` are kept.

    Raises HastenError where the given form says nothing about the rest: noise at alpha 0, the picture at sigma 0;
    and for shapes that do not fit.
    """
    if given == wanted:
        return output
    of_output, of_input = mixing(level, given, wanted)
    dimension, size = _shared(output, network_input)
    kind = torch.promote_types(output.dtype, torch.float32)
    predicted = output.narrow(dimension, 0, size).to(kind)
    result = of_output * predicted + of_input * network_input.narrow(dimension, 0, size).to(kind)
    rest = output.narrow(dimension, size, output.shape[dimension] - size)
    return torch.cat((result.to(output.dtype), rest), dimension) if rest.numel() else result.to(output.dtype)


def mixing(level: NoiseLevel, given: Prediction, wanted: Prediction) -> tuple[float, float]:
    """The factors (p, q) in wanted = p*given + q*x at a noise level, where x is the denoiser's input.

    Both forms and x are mixtures of picture and noise, so that two linear equations determine p and q.
    """
    (given_clean, given_noise), (clean, noise) = _mixture(level, given), _mixture(level, wanted)
    determinant = given_clean * level.sigma - given_noise * level.alpha
    if given == wanted:
        return 1.0, 0.0
    if not determinant:
        raise HastenError(
            f"A denoiser that predicts {given!r} says nothing about {wanted!r} where alpha = {level.alpha:g} and "
            f"sigma = {level.sigma:g}; 'v_prediction' and 'flow_prediction' do at every noise level."
        )
    of_given = (clean * level.sigma - noise * level.alpha) / determinant
    return of_given, (given_clean * noise - given_noise * clean) / determinant


def _mixture(level: NoiseLevel, prediction: Prediction) -> tuple[float, float]:
    """The amounts of picture and noise in a prediction."""
    match prediction:
        case "epsilon":
            return 0.0, 1.0
        case "sample":
            return 1.0, 0.0
        case "v_prediction":
            return -level.sigma, level.alpha
        case "flow_prediction":
            return -1.0, 1.0


def _shared(output: torch.Tensor, network_input: torch.Tensor) -> tuple[int, int]:
    """The dimension in which output and input differ (or any), and the size there that both have."""
    ours, theirs = tuple(output.shape), tuple(network_input.shape)
    unequal = [at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
    if len(ours) != len(theirs) or len(unequal) > 1 or unequal == [0]:
        raise HastenError(f"An output of shape {ours} does not belong to an input of shape {theirs}.")
    dimension = unequal[0] if unequal else 0
    return dimension, min(ours[dimension], theirs[dimension]) if ours else 0
