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
    """The size of the groups: half of the smaller set, so that two disjoint groups exist."""
    return min(samples // 2, references // 2, LARGEST_SUBSET)


def kid(samples: Tensor, sample_ids: Tensor, references: Tensor, reference_ids: Tensor, subset: int) -> Kid:
    """KID of two feature sets whose images have a number for their caption.

    The two groups of each draw share no caption: the estimate is unbiased for independent images only, and copies
    of the very references would come out better than perfect. With the references as samples it is the floor.
    """
    generator = torch.Generator().manual_seed(0)
    values: list[float] = []
    for _ in range(SUBSETS):
        right = torch.randperm(len(references), generator=generator)[:subset]
        free = (~torch.isin(sample_ids, reference_ids[right])).nonzero()[:, 0]
        left = free[torch.randperm(len(free), generator=generator)[:subset]]
        size = min(len(left), len(right))
        values.append(discrepancy(samples[left[:size]].double(), references[right[:size]].double()))
    return summary(values, subset)
