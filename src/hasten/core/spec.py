"""What a denoiser architecture looks like, as data: its block stacks, named streams and released configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn

from hasten.core.block import Planner

Config = Mapping[str, Any]
Guidance = Literal["embedded", "batched", "separate", "none"]
Side = Literal["first", "last"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One `ModuleList` of blocks that run one after the other inside the denoiser."""

    path: str
    """Where the list is, relative to the denoiser."""
    block: str
    """Class name of its members."""
    takes: tuple[str, ...]
    """Streams the block takes: the names of its leading arguments, in order."""
    returns: tuple[str, ...]
    """Streams the block returns, in order; a single stream is returned bare, several as a tuple."""
    denoised: str
    """The stream that carries the picture. Watching another one would make every step look unchanged."""
    branches: tuple[str, ...] = ()
    """Sub-modules whose output is gated and added to a stream (attention, feed-forward)."""
    feeders: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]], hash=False)
    """For a branch, the sub-modules whose outputs reach nothing but it through the block's own code.

    They need not run when the branch's output is known, if that code bears outputs with an empty last dimension.
    """
    indicator: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = field(default=None, hash=False)
    """Computes, from a block of the stack and its arguments by name, the modulated input of its first branch.

    Of the first block it tells how much the present step differs from the last, before any block has run. Where
    the method's authors look at the time embedding instead, so does the specification.
    """
    plan: Planner | None = field(default=None, hash=False)
    """What a block computes, from norm to residual connection, so that it can be run with fused kernels."""

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Pick the streams out of a block call's arguments, whether given by position or by name."""
        return {n: kwargs[n] if n in kwargs else args[i] for i, n in enumerate(self.takes)}

    def write(self, args: tuple[Any, ...], kwargs: dict[str, Any], streams: Mapping[str, Any]) -> tuple[Any, ...]:
        """Put `streams` back into a call's arguments; changes `kwargs` in place and returns the new `args`."""
        positional = list(args)
        for index, name in enumerate(self.takes):
            if name in kwargs:
                kwargs[name] = streams[name]
            else:
                positional[index] = streams[name]
        return tuple(positional)

    def unpack(self, output: Any) -> dict[str, torch.Tensor | None]:
        """Name the streams of a block's output."""
        values = cast("tuple[Any, ...]", output) if len(self.returns) > 1 else (output,)
        return dict(zip(self.returns, values, strict=True))

    def pack(self, streams: Mapping[str, torch.Tensor | None]) -> Any:
        """Make a block output from named streams; the inverse of `unpack`."""
        values = tuple(streams[name] for name in self.returns)
        return values if len(self.returns) > 1 else values[0]


@dataclass(frozen=True, kw_only=True)
class UNetStages:
    """Paths of a U-Net's stages, relative to the denoiser."""

    down: str = "down_blocks"
    mid: str = "mid_block"
    up: str = "up_blocks"
    returns_nchw: tuple[str, ...] = ("Transformer2DModel",)
    """Classes of the sub-modules that return NCHW whatever layout they are given."""
    leaves_tokens: str = "_get_output_for_continuous_inputs"
    """The method of these classes that turns tokens back into a picture, and copies it."""


@dataclass(frozen=True, kw_only=True)
class Released:
    """A published model: its denoiser configuration and usual size, for planning without a download."""

    config: Config
    width: int
    height: int
    steps: int
    text_tokens: int
    frames: int = 1
    pipeline: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class InputSize:
    """Size of a denoiser call: batch, latent height and width (and frames), text tokens."""

    batch: int = 1
    height: int = 16
    width: int = 16
    frames: int = 1
    text_tokens: int = 8


InputMaker = Callable[[Config, InputSize, torch.Generator], dict[str, Any]]
"""Make random float32 CPU arguments for one denoiser call from its configuration."""


@dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """Declares one architecture; caches, compilers and planners read it instead of knowing models."""

    name: str
    model_class: str
    """Class name in diffusers."""
    tiny: Config
    """A random-weight configuration small enough for tests."""
    inputs: InputMaker
    stacks: tuple[Stack, ...] = ()
    """The chain of stacks the denoised stream runs through, in order."""
    unet: UNetStages | None = None
    repeated_blocks: tuple[str, ...] = ()
    """Classes of the blocks that repeat, the unit of regional compilation."""
    attention: tuple[str, ...] = ()
    """Classes of the attention modules."""
    guidance: Guidance = "batched"
    sign: int = 1
    """What pipelines multiply the output with before they hand it to the scheduler: 1 or -1."""
    conditional: Side = "last"
    """Which half of a guided batch follows the prompt; with separate calls, which call of a step."""
    modulation: tuple[str, ...] = ()
    """Glob patterns of the linears that depend on timestep (and pooled text) alone."""
    timed: tuple[str, ...] = ()
    """Of `modulation`, the linears that come after the embedding of timestep, guidance and pooled text (or class)."""
    time_inputs: Callable[[nn.Module, Mapping[str, Any]], Iterator[tuple[str, torch.Tensor]]] | None = field(
        default=None, hash=False
    )
    """From the model and a call's arguments by name: what each of `timed` is given, as pairs of glob and input.

    It reads no other arguments than those that the inputs depend on; of the picture only type and shape. It yields
    nothing for a call in which a linear would be given several things.
    """
    timestep: str = "timestep"
    """Name of the timestep argument."""
    latents: str = "hidden_states"
    """Name of the argument that holds the noisy picture (or a list of pictures)."""
    unpack: Callable[[Mapping[str, Any]], torch.Tensor | None] | None = None
    """From a call's arguments by name, the noisy picture as [batch, channels, rows, columns].

    None where `latents` has such a form itself. It returns None when the arguments do not say how tokens lie.
    """
    released: Mapping[str, Released] = field(default_factory=dict[str, Released])
    frames_per_token: int = 0
    """How many latent frames a token spans, in a model of videos whose latents are [B, C, frames, height, width]."""
    latent_channels: str = "in_channels"
    """Configuration key of the number of channels of the denoiser's input."""

    def build(self, config: Config, *, device: str | torch.device = "cpu", seed: int = 0) -> nn.Module:
        """Create the denoiser with random weights; `device="meta"` allocates nothing."""
        import diffusers

        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            model: nn.Module = getattr(diffusers, self.model_class)(**config)
        return model.eval()

    def build_tiny(self, seed: int = 0) -> nn.Module:
        """Create the test-size model with random weights on the CPU."""
        return self.build(self.tiny, seed=seed)

    def example(self, config: Config, size: InputSize | None = None, seed: int = 0) -> dict[str, Any]:
        """Make random arguments for one call of a model with `config`."""
        generator = torch.Generator().manual_seed(seed)
        return self.inputs(config, size or InputSize(), generator)


def _no_inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    raise NotImplementedError("An architecture without a specification has no example inputs.")


def unknown_spec(model: nn.Module) -> DenoiserSpec:
    """Stand in for an architecture nobody declared: what needs no structure still works, the rest refuses."""
    repeated = cast("list[str] | None", getattr(model, "_repeated_blocks", None)) or []
    return DenoiserSpec(
        name="unknown",
        model_class=type(model).__name__,
        tiny={},
        inputs=_no_inputs,
        repeated_blocks=tuple(repeated),
        guidance="none",
    )
