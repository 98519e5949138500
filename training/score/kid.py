"""KID (EfficientNet-Lite0, 96 px): how far two sets of images are apart as distributions.

Binkowski et al. 2018, https://arxiv.org/abs/1801.01401: the unbiased squared maximum mean discrepancy under the
kernel (x.y / d + 1)^3, here on features of another network and times 1000, so not comparable with published KID.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUBSETS = 100
LARGEST_SUBSET = 250


@dataclass(frozen=True)
class Kid:
    """Mean and standard deviation over random subsets of `subset` images a side, times 1000."""

    mean: float
    spread: float
    subset: int


def kernel(left: Tensor, right: Tensor) -> Tensor:
    """The cubic polynomial kernel of two feature sets."""
    return (left @ right.T / left.shape[1] + 1).pow(3)


def discrepancy(left: Tensor, right: Tensor) -> float:
    """The unbiased estimate of the squared discrepancy of two feature sets of equal size."""
    n = len(left)
    within = sum((k.sum() - k.trace()).item() / (n * (n - 1)) for k in (kernel(left, left), kernel(right, right)))
    return within - 2 * kernel(left, right).mean().item()


def summary(values: list[float], subset: int) -> Kid:
    """Mean and spread of the estimates, times 1000."""
    all_values = torch.tensor(values, dtype=torch.float64) * 1000
    return Kid(all_values.mean().item(), all_values.std().item(), subset)


def subset_size(samples: int, references: int) -> int:
    """The largest size that leaves two disjoint groups of references, so that the floor uses the same."""
    return min(samples, references // 2, LARGEST_SUBSET)


def kid(samples: Tensor, references: Tensor, subset: int, seed: int = 0) -> Kid:
    """KID of two feature sets."""
    generator = torch.Generator().manual_seed(seed)
    left, right = samples.double(), references.double()

    def draw(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:subset]]

    return summary([discrepancy(draw(left), draw(right)) for _ in range(SUBSETS)], subset)


def kid_floor(references: Tensor, subset: int, seed: int = 0) -> Kid:
    """KID of disjoint random groups of the same images: what a perfect model would get."""
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    for _ in range(SUBSETS):
        order = torch.randperm(len(references), generator=generator)
        left, right = references[order[:subset]].double(), references[order[subset : 2 * subset]].double()
        values.append(discrepancy(left, right))
    return summary(values, subset)
