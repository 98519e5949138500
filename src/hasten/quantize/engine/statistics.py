"""What is known of the inputs of a layer: enough to compute the error of any quantizer's output, without any input.

With H, the mean of x x^T over tokens, the squared error of the output that a change D of the weight makes is, in the
mean over tokens, tr(D H D^T), exactly. GPTQ, AWQ, smoothing and low-rank corrections need nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from hasten.core.errors import HastenError
from hasten.kernels.hadamard import rotate

FULL = 4096
"""Up to so many inputs all second moments are kept; beyond, only those within blocks of `BLOCK` inputs."""
BLOCK = 1024
EXACT = 1024
"""Up to so many inputs sums are kept in float64."""


def block_size(inputs: int) -> int:
    """The side of the blocks along the diagonal of H that are kept."""
    return inputs if inputs <= FULL else math.gcd(inputs, BLOCK)


@dataclass(frozen=True)
class InputStatistics:
    """Statistics over all tokens that a layer was given."""

    count: int
    """Tokens seen."""
    absmax: torch.Tensor
    """[inputs] float32: the greatest magnitude of each channel."""
    mean_abs: torch.Tensor
    """[inputs] float32: the mean magnitude."""
    second: torch.Tensor
    """[blocks, size, size] float32: the mean of x x^T, whole (1 block) or its blocks along the diagonal."""

    @property
    def inputs(self) -> int:
        """Channels."""
        return self.absmax.shape[0]

    @property
    def power(self) -> torch.Tensor:
        """[inputs]: the mean square of each channel."""
        return self.second.diagonal(dim1=1, dim2=2).reshape(-1)

    def to(self, device: torch.device) -> InputStatistics:
        """The same on a device."""
        return InputStatistics(
            self.count, self.absmax.to(device), self.mean_abs.to(device), self.second.to(device)
        )  # fmt: skip

    def divided(self, smooth: torch.Tensor) -> InputStatistics:
        """Those of x / smooth, for `smooth` [inputs]."""
        parts = smooth.float().reshape(self.second.shape[0], -1)
        second = self.second / parts[:, :, None] / parts[:, None, :]
        return replace(self, absmax=self.absmax / smooth, mean_abs=self.mean_abs / smooth, second=second)

    def rotated(self, group: int) -> InputStatistics:
        """The second moments of x rotated in groups, exactly; the rest as a normal distribution would have it."""
        second = joined(self.second, group)
        second = rotate(rotate(second, group).mT, group).mT
        root = second.diagonal(dim1=1, dim2=2).reshape(-1).clamp(min=0).sqrt()
        largest, mean = root * expected_maximum(self.count), root * (2 / math.pi) ** 0.5
        return InputStatistics(self.count, largest, mean, second)

    def check(self, layer: str) -> InputStatistics:
        """Itself; raises HastenError where inputs were not finite."""
        if not (self.absmax.isfinite().all() and self.second.isfinite().all()):
            raise HastenError(f"{layer} was given infinite or undefined numbers; nothing can be calibrated with those.")
        return self


def joined(second: torch.Tensor, size: int) -> torch.Tensor:
    """Second moments in blocks of at least a size: blocks are put together, with nothing known between them."""
    count = max(1, size // second.shape[1])
    if count == 1:
        return second
    return torch.stack([torch.block_diag(*blocks) for blocks in second.split(count)])


def expected_maximum(count: int) -> float:
    """About the greatest magnitude of so many standard normal numbers."""
    return math.sqrt(2 * math.log(max(2 * count, 3)))


class Running:
    """Sums over the tokens seen so far. Nothing of an input is kept."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        size = block_size(inputs)
        kind = torch.float64 if inputs <= EXACT else torch.float32
        self.count = 0
        self.absmax = torch.zeros(inputs, device=device)
        self.total = torch.zeros(inputs, device=device, dtype=torch.float64)
        self.second = torch.zeros(inputs // size, size, size, device=device, dtype=kind)

    def add(self, tokens: torch.Tensor) -> None:
        """Take in tokens, [tokens, inputs]."""
        exact = tokens.detach().float()
        self.count += exact.shape[0]
        self.absmax = torch.maximum(self.absmax, exact.abs().amax(0))
        self.total += exact.abs().sum(0, dtype=torch.float64)
        parts = exact.reshape(exact.shape[0], self.second.shape[0], -1).transpose(0, 1)
        self.second += parts.mT @ parts

    def join(self, known: InputStatistics) -> None:
        """Take in what was found out before."""
        self.count += known.count
        self.absmax = torch.maximum(self.absmax, known.absmax.to(self.absmax))
        self.total += known.mean_abs.to(self.total) * known.count
        self.second += known.second.to(self.second) * known.count

    def statistics(self) -> InputStatistics:
        """What is known so far."""
        count = max(self.count, 1)
        return InputStatistics(
            self.count, self.absmax, (self.total / count).float(), (self.second / count).float()
        )  # fmt: skip


def quadratic(change: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each output that a change of the weight, [outputs, inputs], makes: [outputs]."""
    parts = change.float().reshape(change.shape[0], second.shape[0], -1).transpose(0, 1)
    return ((parts @ second) * parts).sum((0, 2))
