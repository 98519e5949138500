"""What one product of activations with a quantized weight consists of, and what a kernel for it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from hasten.kernels.activations import Activations
from hasten.kernels.prepared import prepare
from hasten.kernels.weight import QuantizedWeight, Scales


@dataclass(frozen=True)
class Product:
    """The input, [tokens, inputs], is smoothed, rotated, rounded and multiplied by the weight; then come bias and side
    branch, which works on the input as it came. The output is [tokens, outputs] in the type of the input.
    """

    x: torch.Tensor
    weight: QuantizedWeight
    bias: torch.Tensor | None = None
    activations: Activations = "none"
    input_scale: torch.Tensor | None = None
    """[] the fixed scale of 8-bit activations."""
    smooth: torch.Tensor | None = None
    """[inputs]: the input is divided by it first."""
    rotation: int = 1
    """Channels that a Hadamard matrix rotates together, after smoothing."""
    down: torch.Tensor | None = None
    """[ranks, inputs]"""
    up: torch.Tensor | None = None
    """[outputs, ranks]"""
    rank_scale: torch.Tensor | None = None
    """[ranks]: factors between `down` and `up`."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tokens, outputs and inputs."""
        return self.x.shape[0], self.weight.shape[0], self.x.shape[1]

    @property
    def is_matrix(self) -> bool:
        """Is the grid of the weight the matrix [outputs, inputs] itself?"""
        return self.weight.columns == self.x.shape[1] and self.weight.codes.shape[0] == self.weight.shape[0]

    @property
    def group(self) -> int:
        """Inputs that share all of scale, minimum and zero point."""
        return math.gcd(*(self.weight.columns // tensor.shape[1] for tensor in _by_group(self.weight)))

    @property
    def by_row(self) -> bool:
        """Is the weight a scale for each output (or one for all) times codes, and nothing else?"""
        weight = self.weight
        return self.is_matrix and weight.groups == 1 and weight.minimum is None and weight.zero is None

    def prepared(self) -> torch.Tensor:
        """The input after smoothing and rotation, in its own type."""
        return prepare(self.x, self.smooth, self.rotation)

    def plain(self) -> Product:
        """The same with the input prepared, and without side branch."""
        return replace(self, x=self.prepared(), smooth=None, rotation=1, down=None, up=None, rank_scale=None)

    def with_side(self, found: torch.Tensor) -> torch.Tensor:
        """Add the side branch to the rest of the product."""
        if self.down is None or self.up is None:
            return found
        return found + F.linear(self.ranks(), self.up.to(self.x.dtype))

    def ranks(self) -> torch.Tensor:
        """The first half of the side branch, scaled: [tokens, ranks]."""
        assert self.down is not None
        found = F.linear(self.x, self.down.to(self.x.dtype))
        return found if self.rank_scale is None else found * self.rank_scale.to(found.dtype)


@dataclass(frozen=True)
class Kernel:
    """A way to compute products."""

    name: str
    takes: Callable[[Product], bool]
    """Can it do this one?"""
    run: Callable[[Product], torch.Tensor]
    suits: Callable[[Product], bool] = lambda product: True
    """Is it made for so many tokens? Asked only where nothing was measured."""


def row_scales(weight: QuantizedWeight) -> torch.Tensor:
    """The scale of each output, float32 [outputs], of a weight that has one for each (or one for all)."""
    return weight.scale.values().reshape(-1).expand(weight.shape[0]).contiguous()


def _by_group(weight: QuantizedWeight) -> list[torch.Tensor]:
    scales: list[Scales] = [scales for scales in (weight.scale, weight.minimum) if scales is not None]
    found = [scales.codes for scales in scales]
    found += [scales.coarse for scales in scales if scales.coarse is not None]
    return found if weight.zero is None else [*found, weight.zero]
