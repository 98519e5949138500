"""What the declarations of blocks have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hasten.core.block import FeedForwardPlan, Residual

ZERO = ("shift1", "scale1", "gate1", "shift2", "scale2", "gate2")
"""The parts of adaLN-Zero in the order in which its linear layer puts them out, for attention and feed-forward."""


def named(names: Sequence[str], modulation: torch.Tensor, dim: int = -1) -> dict[str, torch.Tensor]:
    """Cut a modulation into equal parts with names."""
    return dict(zip(names, modulation.chunk(len(names), dim=dim), strict=True))


def for_text(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The modulation of the text stream, apart from the picture's."""
    return {f"text_{name}": part for name, part in parts.items()}


def modulated(
    number: int, norm: str, *, stream: str = "hidden_states", argument: str = "", text: bool = False,
    gated: bool = True, early: bool = False,
) -> Residual:  # fmt: skip
    """A residual connection with the shift, scale and gate of a number, of the picture or of the text."""
    prefix = "text_" if text else ""
    return Residual(
        stream=stream,
        norm=norm,
        shift=f"{prefix}shift{number}",
        scale=f"{prefix}scale{number}",
        gate=f"{prefix}gate{number}" if gated else "",
        argument=argument,
        early=early,
    )


def of_text(number: int, norm: str, argument: str = "", *, gated: bool = True) -> Residual:
    """The same on the stream of the text."""
    return modulated(number, norm, stream="encoder_hidden_states", argument=argument, text=True, gated=gated)


def gelu_feed_forward(module: str) -> FeedForwardPlan:
    """Diffusers' `FeedForward` with the tanh form of GELU."""
    return FeedForwardPlan(module=module, enters=("net.0.proj",), activation="gelu_tanh", leaves="net.2")


def is_gelu(module: Any) -> bool:
    """Is this `FeedForward` of that kind?"""
    first = module.net[0]
    return type(first).__name__ == "GELU" and first.approximate == "tanh" and len(module.net) == 3


def pairs(waves: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of complex rotations, [..., pairs], as views."""
    cosines, sines = torch.view_as_real(waves).unbind(-1)
    return cosines, sines


def with_batch(turns: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, pairs] as [1, tokens, pairs]."""
    return turns[0].unsqueeze(0), turns[1].unsqueeze(0)
