"""Runs a feed-forward from its declaration: layers, activation in one pass, layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hasten.compilation.fusing.modules import coding_of, part
from hasten.compilation.fusing.segments import is_plain
from hasten.core.block import Activation, FeedForwardPlan
from hasten.kernels.coded import Coded, Coding
from hasten.kernels.gated import activate
from hasten.kernels.linear import fuses_gelu, linear_gelu


class FusedFeedForward:
    """A link around a feed-forward's `forward`."""

    def __init__(self, module: nn.Module, plan: FeedForwardPlan) -> None:
        self.module, self.plan = module, plan
        self.ran = False
        """Written, never read, where code is compiled."""

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's output; what is not declared runs its own code."""
        if len(args) != 1 or kwargs or self.module.training:
            return call(*args, **kwargs)
        self.ran = True
        given: torch.Tensor | Coded = args[0]
        last = part(self.module, self.plan.leaves)
        return last(enter(self.entering, given, self.plan.activation, last))

    @property
    def entering(self) -> list[Any]:
        """The layers on the input."""
        return [part(self.module, path) for path in self.plan.enters]

    def coding(self, device: torch.device) -> Coding | None:
        """How the input may be rounded beforehand."""
        return None if self.module.training else coding_of(self.entering, device)


def enter(
    layers: Sequence[Any], given: torch.Tensor | Coded, activation: Activation, last: Any
) -> torch.Tensor | Coded:
    """What the layers before the activation and it make of an input, as the layer after it takes it."""
    layer = layers[0]
    if isinstance(given, torch.Tensor) and _ends_with_gelu(layer, given, activation, last):
        return linear_gelu(given, layer.weight, layer.bias)
    first, *others = [layer(given) for layer in layers]
    return activate(first, activation, others[0] if others else None, coding_of([last], first.device))


def _ends_with_gelu(layer: Any, given: torch.Tensor, activation: Activation, last: Any) -> bool:
    """Can the product of a plain layer end with the activation?"""
    if activation != "gelu_tanh" or not is_plain(layer) or coding_of([last], given.device) is not None:
        return False
    return fuses_gelu(given, layer.weight, layer.bias)
