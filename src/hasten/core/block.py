"""Where in a block norms, modulation, projections, activations, gates and residual connections are, as data.

From such a declaration a block is run with fused kernels, without a copy of the model's code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

Activation = Literal["gelu", "gelu_tanh", "swiglu"]
"""What stands between the layers of a feed-forward; "swiglu" is silu(first) * second, of two layers' outputs."""
Modulation = Callable[[nn.Module, Mapping[str, Any]], Mapping[str, torch.Tensor]]
"""From a block and its arguments by name: shifts, scales and gates by name, each [batch, channels] for all tokens of a
sample or [batch, tokens or 1, channels]."""
Rotations = Callable[[Any], "list[tuple[torch.Tensor, torch.Tensor] | None]"]
"""From the block's argument that holds the rotary embedding: cosines and sines of each stream of the attention, or one
pair for all of them as they are joined; [batch or 1, tokens, head size / 2], a number for two neighbouring channels."""


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A residual connection: stream + gate * after(module(norm(stream) * (1 + scale) + shift))."""

    stream: str
    norm: str = ""
    """Path of the norm before the module; without one the module takes the stream as it is."""
    shift: str = ""
    """Name of the shift in the modulation; empty for none, as with `scale` and `gate`."""
    scale: str = ""
    gate: str = ""
    after: str = ""
    """Path of the norm of what the module returns, before the gate."""
    argument: str = ""
    """Name under which the module takes it; empty for its first argument."""
    early: bool = False
    """Does the module take the stream as it came into the block? The result is added where the stream is by then."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A feed-forward beside the module, on the same input, projected together with the module's output."""

    enters: str
    activation: Activation
    leaves: str
    """The linear layer whose input is the module's output and, after it, the activated one."""


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """One module with its residual connections, one for each output it returns, in order."""

    module: str
    residuals: tuple[Residual, ...]
    given: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    """What else the module is given: its own names, and the block's arguments."""
    joined: bool = False
    """Are the streams joined, in order, to one sequence for the module, and cut again afterwards?"""
    beside: Beside | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Self-attention, or joint attention of two streams, with norms and rotation of queries and keys."""

    module: str
    processor: str
    """Class name of the processor whose steps these are; with another one the module runs its own code."""
    second: Literal["none", "first", "last"] = "none"
    """Where the tokens of the second stream stand, if there is one."""
    rotary: str = ""
    """The module's argument that holds the rotary embedding, if there is one."""
    rotations: Rotations | None = field(default=None, hash=False)
    across_heads: bool = False
    """Are queries and keys normalized over all heads together?"""
    mask: str = ""
    """The module's argument that holds a mask of [batch, keys], or one to add to the scores."""
    absent: tuple[str, ...] = ()
    """Arguments of the module with which it does more than is declared."""


@dataclass(frozen=True, kw_only=True)
class FeedForwardPlan:
    """Linear layers, an activation and a linear layer."""

    module: str
    enters: tuple[str, ...]
    activation: Activation
    leaves: str


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """What a block computes. A call with arguments that are not declared runs the block's own code."""

    sublayers: tuple[Sublayer, ...]
    """In the order in which their results are added."""
    modulation: Modulation | None = field(default=None, hash=False)
    attention: tuple[AttentionPlan, ...] = ()
    """Of the modules above, those whose inside is declared."""
    feed_forward: tuple[FeedForwardPlan, ...] = ()
    absent: tuple[str, ...] = ()
    """Arguments of the block, or attributes of it, with which it does more than is declared: each None or empty."""
    ends: tuple[str, ...] = ()
    """Streams that this block drops: it returns None for them."""


Planner = Callable[[nn.Module], "BlockPlan | None"]
"""Declares what a block of a stack computes, or None for a variant that is not declared."""
