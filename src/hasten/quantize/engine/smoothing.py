"""Factors that divide the channels of an input and multiply those of the weight, so that both are easier to round.

Sources: SmoothQuant, https://arxiv.org/abs/2211.10438; AWQ, https://arxiv.org/abs/2306.00978; SVDQuant,
https://arxiv.org/abs/2411.05007.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from hasten.kernels.activations import INT4_GROUP, Activations
from hasten.kernels.rounding import fitting_group
from hasten.quantize.engine.statistics import InputStatistics

LEAST = 1e-4
"""Magnitudes below are taken for this, so that a channel that is always 0 does not get an infinite factor."""
_POWER, _MOMENT = 8, 105.0
"""A power, and its mean for standard normal numbers: maxima are estimated by the norm of that power."""

Score = Callable[[torch.Tensor], float]
"""The error that smoothing factors, [inputs], leave."""


def weight_span(matrices: Iterable[torch.Tensor]) -> torch.Tensor:
    """The greatest magnitude of each channel over several weights, [inputs]."""
    return torch.stack([matrix.abs().amax(0) for matrix in matrices]).amax(0)


def factors(inputs: torch.Tensor, weights: torch.Tensor, alpha: float, beta: float, kind: torch.dtype) -> torch.Tensor:
    """inputs**alpha / weights**beta, centred around 1 and as a layer of type `kind` will hold it, float32."""
    found = inputs.clamp(min=LEAST) ** alpha / weights.clamp(min=LEAST) ** beta
    found = found / (found.max() * found.min()).sqrt()
    return found.clamp(LEAST, 1 / LEAST).to(kind).float()


def exponents(grid: int) -> Iterator[tuple[float, float]]:
    """Pairs of alpha and beta that are tried: of the inputs alone, and shared out between inputs and weights."""
    for step in range(grid + 1):
        alpha = step / grid
        yield alpha, 0.0
        if 0 < step < grid:
            yield alpha, 1 - alpha


def best_factors(candidates: Iterable[torch.Tensor], score: Score) -> torch.Tensor | None:
    """The candidate with the least error; None where doing nothing is as good. The first has to be that: ones."""
    best, least = None, float("inf")
    for number, tried in enumerate(candidates):
        error = score(tried)
        if error < least:
            best, least = (tried if number else None), error
    return best


def activation_noise(known: InputStatistics, kind: Activations) -> torch.Tensor:
    """The mean squared error that rounding adds to each channel of an input, [inputs]; an estimate.

    Rounding in steps of d errs by d**2 / 12. The step is a fraction of the greatest number of the token (or of the
    group of 64), whose mean square is estimated from those of the channels as if these were normal; `absmax` bounds
    it. Floating point has no common step; its error is a share of each number.
    """
    if kind == "none":
        return torch.zeros_like(known.absmax)
    if kind.startswith("float8"):
        return known.power * (2.0**-4) ** 2 / 3
    group = known.inputs if kind == "int8" else fitting_group(known.inputs, INT4_GROUP)
    levels = 127 if kind == "int8" else 7
    parts = known.power.clamp(min=0).reshape(-1, group)
    largest = (_MOMENT * (parts ** (_POWER // 2)).sum(1)) ** (2 / _POWER)
    bound = known.absmax.reshape(-1, group).amax(1) ** 2
    return (torch.minimum(largest, bound) / levels**2 / 12).repeat_interleave(group)


def rounding_noise(rounded: Sequence[torch.Tensor] | torch.Tensor, noise: torch.Tensor) -> float:
    """The error of the output that noise of the input makes in a product with a weight, [outputs, inputs]."""
    matrices = [rounded] if isinstance(rounded, torch.Tensor) else rounded
    return sum(float(matrix.square().sum(0) @ noise) for matrix in matrices)
