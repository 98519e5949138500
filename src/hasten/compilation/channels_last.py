"""Stores the weights of convolutional networks as NHWC, the layout their fast kernels work in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hasten.compilation.compiler import call_block
from hasten.compilation.layout import LayoutCount, counted
from hasten.compilation.parts import decoder
from hasten.core.errors import NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Denoiser, Target
from hasten.core.technique import Cost, Evidence, Stage, Technique
from hasten.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Technique):
    """Lays out the U-Net's and the VAE's convolution weights as NHWC (same shapes and values, other strides).

    Activations follow by themselves, because a convolution with NHWC weights returns NHWC; where a U-Net's attention
    stage would go back to NCHW, it is kept from it. A transformer has no convolutions that matter, so there only the
    VAE is changed. The first call of each network is made twice, once under observation: it counts activations by
    layout and the copies that change it. Leaving restores values, shapes and strides exactly.
    """

    stage: ClassVar[Stage] = Stage.LAYOUT
    paper: ClassVar[str] = "https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html"

    def claims(self) -> tuple[str, ...]:
        """The layout of the weights."""
        return ("layout",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a network of two-dimensional convolutions."""
        if not list(_networks(target)):
            yield f"{target.title} has neither a U-Net nor an image VAE, so there is nothing to lay out as NHWC."

    def apply(self, target: Target, patch: Patch) -> None:
        """Re-stride the weights, and look at the activations of the first call."""
        seen = patch.keep(_Seen())
        for name, weights, called in _networks(target):
            patch.restride(weights, torch.channels_last, "convolution weights are laid out as NHWC")
            patch.around(called, seen.looking(name, called), "the layouts in its first call are counted")
        for denoiser in target.denoisers:
            _keep_nhwc(denoiser, patch)

    def engaged(self, session: Session) -> Evidence:
        """Weights are, and activations were, NHWC."""
        seen, parts = session.state(self, _Seen), list[str]()
        for name, weights, _ in _networks(session.target):
            if (count := seen.counts.get(name)) is not None:
                kernels = [m.weight for m in _inner_convolutions(weights)]
                laid_out = sum(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
                parts.append(f"{name}: {laid_out} of {len(kernels)} convolution weights and {count.in_words()}")
        if not any(count.nhwc for count in seen.counts.values()):
            raise NotEngaged("no activation was NHWC." if seen.counts else "no convolution ran.")
        return Evidence(summary="; ".join(parts))

    def cost(self, target: Target, workload: Workload) -> Cost:
        """The gain depends on the device; memory does not grow."""
        return Cost(basis="measured")


class _Seen:
    """What the first call of each network was made of."""

    def __init__(self) -> None:
        self.counts: dict[str, LayoutCount] = {}

    def looking(self, name: str, network: nn.Module) -> Callable[..., Any]:
        def look(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling() and name not in self.counts:
                # Beside the call itself, which may be compiled, recorded or left out by a cache.
                self.counts[name] = counted(lambda: call_block(network, *args, **kwargs))
            return call(*args, **kwargs)

        return look


def _keep_nhwc(denoiser: Denoiser, patch: Patch) -> None:
    """Keep a U-Net's attention stages from returning NCHW: spare the copy they make, or else make one back."""
    if (unet := denoiser.spec.unet) is None:
        return
    for _, module in denoiser.of_class(*unet.returns_nchw):
        if callable(getattr(module, unet.leaves_tokens, None)):
            patch.around(module, _without_copy, "its output stays as it lies", method=unet.leaves_tokens)
        patch.around(module, _as_nhwc, "its output is laid out as NHWC")


class _AsItLies(TorchFunctionMode):
    """Leaves pictures in NHWC where `contiguous()` would copy them to NCHW."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.contiguous and not kwargs and len(args) == 1:
            value = cast(torch.Tensor, args[0])
            if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
                return value
        return func(*args, **(kwargs or {}))


def _without_copy(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _AsItLies():
        return call(*args, **kwargs)


def _as_nhwc(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    output = call(*args, **kwargs)
    if isinstance(output, tuple):
        return tuple(_laid_out(value) for value in cast("tuple[object, ...]", output))
    output.sample = _laid_out(output.sample)
    return output


def _laid_out(value: object) -> object:
    if isinstance(value, torch.Tensor) and value.dim() == 4:
        return value.contiguous(memory_format=torch.channels_last)
    return value


def _networks(target: Target) -> Iterable[tuple[str, nn.Module, nn.Module]]:
    """Name, network, and the part that is called, of the U-Nets and the VAE that have convolutions to re-stride."""
    candidates = [(d.name, d.module, d.module) for d in target.denoisers if d.spec.unet is not None]
    if target.vae is not None:
        candidates.append(("vae", target.vae, decoder(target) or target.vae))
    return [candidate for candidate in candidates if _inner_convolutions(candidate[1])]


def _inner_convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """Convolutions with a kernel larger than 1x1: for 1x1 weights both layouts are the same."""
    return [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
