"""A linear layer whose input is smoothed and rotated first, and whose weight was made for such inputs.

Computes the same as the plain layer, up to rounding. What it is good for: the inner weight and its inputs are easier to
quantize, and a quantizer that meets such a layer takes smoothing and rotation over into the layer it makes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from hasten.kernels.hadamard import rotate


def prepare(x: torch.Tensor, smooth: torch.Tensor | None, rotation: int) -> torch.Tensor:
    """The input of the inner layer, [..., inputs]: divided by `smooth`, [inputs], then rotated in groups."""
    x = x if smooth is None else x / smooth.to(x.dtype)
    return x if rotation == 1 else rotate(x, rotation)


def prepare_weight(matrix: torch.Tensor, smooth: torch.Tensor | None, rotation: int) -> torch.Tensor:
    """The weight for prepared inputs of a layer with the weight `matrix`, [outputs, inputs]; float32."""
    matrix = matrix.float()
    matrix = matrix if smooth is None else matrix * smooth.to(matrix)
    return matrix if rotation == 1 else rotate(matrix, rotation)


def raw_weight(matrix: torch.Tensor, smooth: torch.Tensor | None, rotation: int) -> torch.Tensor:
    """The inverse of `prepare_weight`: from a weight for prepared inputs to that for inputs as they come; float32.

    Also for the rows of a side branch, [ranks, inputs], that were made for prepared inputs.
    """
    matrix = matrix.float()
    matrix = matrix if rotation == 1 else rotate(matrix, rotation)
    return matrix if smooth is None else matrix / smooth.to(matrix)


class PreparedLinear(nn.Linear):
    """A linear layer around one with a transformed weight. It is a `Linear`, so that adapters can stand around it."""

    linear: nn.Linear
    smooth: torch.Tensor | None

    def __init__(self, linear: nn.Linear, *, smooth: torch.Tensor | None = None, rotation: int = 1) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.rotation = rotation
        self.linear = linear
        self.register_buffer("smooth", smooth)
        self.training = linear.training

    @classmethod
    def around(
        cls,
        linear: nn.Linear,
        *,
        smooth: torch.Tensor | None = None,
        rotation: int = 1,
        raw: torch.Tensor | None = None,
    ) -> PreparedLinear:
        """A prepared layer that computes the same as a plain one; the bias is shared, the weight is a new one.

        `raw` is the plain layer's weight, if `linear` has another.
        """
        made = nn.Linear(linear.in_features, linear.out_features, False, device="meta")
        weight = prepare_weight(linear.weight.detach() if raw is None else raw, smooth, rotation)
        made.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=linear.weight.requires_grad)
        made.bias = linear.bias
        return cls(made.train(linear.training), smooth=smooth, rotation=rotation)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.Linear
        """[..., inputs] to [..., outputs]."""
        return self.linear(prepare(input, self.smooth, self.rotation))

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight of the plain layer that computes the same, made anew each time it is asked for."""
        inner = self.linear.weight.detach()
        return raw_weight(inner, self.smooth, self.rotation).to(inner.dtype)

    @property
    def bias(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bias of the inner layer."""
        return cast("torch.Tensor | None", self.linear.bias)

    def extra_repr(self) -> str:
        """What is done to the input."""
        smoothed = "" if self.smooth is None else ", smoothed"
        rotated = "" if self.rotation == 1 else f", rotated in groups of {self.rotation}"
        return f"{super().extra_repr()}{smoothed}{rotated}"
