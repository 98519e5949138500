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

    def doubted(self, amount: float) -> InputStatistics:
        """With products of different channels made smaller by a share."""
        return replace(self, second=shrunk(self.second, amount))

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
    """Sums over the tokens seen so far, those of every other picture apart. Nothing of an input is kept."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        size = block_size(inputs)
        kind = torch.float64 if inputs <= EXACT else torch.float32
        self.counts = [0, 0]
        self.absmax = torch.zeros(inputs, device=device)
        self.total = torch.zeros(inputs, device=device, dtype=torch.float64)
        self.halves = torch.zeros(2, inputs // size, size, size, device=device, dtype=kind)

    def add(self, tokens: torch.Tensor, half: int = 0) -> None:
        """Take in tokens, [tokens, inputs], of a picture that belongs to one of the halves."""
        exact = tokens.detach().float()
        self.counts[half] += exact.shape[0]
        self.absmax = torch.maximum(self.absmax, exact.abs().amax(0))
        self.total += exact.abs().sum(0, dtype=torch.float64)
        parts = exact.reshape(exact.shape[0], self.halves.shape[1], -1).transpose(0, 1)
        self.halves[half] += parts.mT @ parts

    def sums(self) -> Sums:
        """What is known so far."""
        counts = torch.tensor(self.counts, device=self.halves.device).clamp(min=1)
        halves = (self.halves / counts[:, None, None, None]).float()
        mean = (self.total / max(sum(self.counts), 1)).float()
        return Sums((self.counts[0], self.counts[1]), self.absmax, mean, halves)

    @classmethod
    def of(cls, known: Sums, device: torch.device) -> Running:
        """Go on from what was found out before."""
        made = cls(known.absmax.shape[0], device)
        made.counts = list(known.counts)
        made.absmax = known.absmax.to(made.absmax)
        made.total = known.mean_abs.to(made.total) * sum(known.counts)
        counts = torch.tensor(known.counts, device=device)
        made.halves = known.halves.to(made.halves) * counts[:, None, None, None]
        return made


@dataclass(frozen=True)
class Sums:
    """What was seen of an input, in two halves that have no picture in common."""

    counts: tuple[int, int]
    """Tokens of each half."""
    absmax: torch.Tensor
    mean_abs: torch.Tensor
    halves: torch.Tensor
    """[2, blocks, size, size]: the mean of x x^T over the tokens of each half."""

    def statistics(self) -> InputStatistics:
        """The statistics of both halves together, with products of different channels trusted as far as they hold.

        With few pictures some products are chance. How far they are drawn towards 0 is what makes one half likeliest
        in view of the other (see `doubt`).
        """
        count = max(sum(self.counts), 1)
        shares = torch.tensor(self.counts, device=self.halves.device) / count
        second = (self.halves * shares[:, None, None, None]).sum(0)
        found = InputStatistics(sum(self.counts), self.absmax, self.mean_abs, second)
        return found.doubted(doubt(self.halves) if min(self.counts) else ALONE)


DOUBTS = (0.0, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
"""By how much products of different channels may be made smaller."""
ALONE = 0.1
"""The same where all tokens are of one picture."""


def doubt(halves: torch.Tensor) -> float:
    """By how much products of different channels have to be made smaller, for the mean of two halves.

    For either half the one of `DOUBTS` is looked for with which its moments, taken for those of a normal
    distribution, make the other half likeliest: tr(B A^-1) + log det A is least. It depends on the small directions
    of A, which is what GPTQ uses. Twice the data needs half the doubt (as odds).
    """
    scores = [
        _unlikelihood(halves[0], halves[1], amount) + _unlikelihood(halves[1], halves[0], amount) for amount in DOUBTS
    ]
    best = DOUBTS[min(range(len(DOUBTS)), key=scores.__getitem__)]
    return best / (2 - best)


def _unlikelihood(known: torch.Tensor, other: torch.Tensor, amount: float) -> float:
    total = 0.0
    for moments, seen in zip(shrunk(known, amount).double(), other.double(), strict=True):
        floor = 1e-6 * moments.diagonal().mean().clamp(min=1e-30)
        factor, failed = torch.linalg.cholesky_ex(moments + floor * torch.eye(len(moments)).to(moments))
        if failed.item():
            return math.inf
        spread = torch.cholesky_solve(seen, factor).diagonal().sum()
        total += float(spread + 2 * factor.diagonal().log().sum())
    return total


def shrunk(second: torch.Tensor, amount: float) -> torch.Tensor:
    """Second moments, [blocks, size, size], with all but the diagonal made smaller by a share."""
    return second * (1 - amount) + torch.diag_embed(second.diagonal(dim1=1, dim2=2)) * amount


def quadratic(change: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each output that a change of the weight, [outputs, inputs], makes: [outputs]."""
    parts = change.float().reshape(change.shape[0], second.shape[0], -1).transpose(0, 1)
    return ((parts @ second) * parts).sum((0, 2))
