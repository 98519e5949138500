"""Runs a feed-forward from its declaration: layers, activation in one pass, layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hasten.compilation.fusing.modules import coding_of, part
from hasten.core.block import FeedForwardPlan
from hasten.kernels.coded import Coded, Coding
from hasten.kernels.gated import activate


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
        first, *others = [layer(given) for layer in self.entering]
        last = part(self.module, self.plan.leaves)
        coding = coding_of([last], first.device)
        return last(activate(first, self.plan.activation, others[0] if others else None, coding))

    @property
    def entering(self) -> list[Any]:
        """The layers on the input."""
        return [part(self.module, path) for path in self.plan.enters]

    def coding(self, device: torch.device) -> Coding | None:
        """How the input may be rounded beforehand."""
        return None if self.module.training else coding_of(self.entering, device)
