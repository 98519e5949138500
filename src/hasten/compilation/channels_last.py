"""Stores the weights of convolutional networks as NHWC, the layout their fast kernels work in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from hasten.core.errors import NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique
from hasten.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ChannelsLast(Technique):
    """Lays out the U-Net's and the VAE's convolution weights as NHWC (same shapes and values, other strides).

    Activations follow by themselves, because a convolution with NHWC weights returns NHWC; where a U-Net's attention
    stage would return NCHW, its output is laid out as NHWC again. A transformer has no convolutions that matter, so
    there only the VAE is changed. Leaving restores values, shapes and strides exactly.
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
        """Re-stride the weights, and watch what layout the activations have."""
        seen = patch.keep(_Seen())
        for name, network in _networks(target):
            patch.restride(network, torch.channels_last, "convolution weights are laid out as NHWC")
            for convolution in _inner_convolutions(network):
                patch.around(convolution, seen.watching(name), "its output's layout is watched")
        for denoiser in target.denoisers:
            if denoiser.spec.unet is not None:
                for _, module in denoiser.of_class(*denoiser.spec.unet.returns_nchw):
                    patch.around(module, _as_nhwc, "its output is laid out as NHWC")

    def engaged(self, session: Session) -> Evidence:
        """Activations between convolutions really were NHWC."""
        seen = session.state(self, _Seen)
        if not any(seen.nhwc.values()):
            raise NotEngaged("no activation was NHWC" if seen.other else "no convolution ran.")
        parts = [f"{name}: {count} of {count + seen.other.get(name, 0)}" for name, count in seen.nhwc.items()]
        return Evidence(summary=f"activations in NHWC ({', '.join(parts)} convolution outputs)")

    def cost(self, target: Target, workload: Workload) -> Cost:
        """The gain depends on the device; memory does not grow."""
        return Cost(basis="measured")


class _Seen:
    """Counts convolution outputs by layout, for each network."""

    def __init__(self) -> None:
        self.nhwc: dict[str, int] = {}
        self.other: dict[str, int] = {}

    def watching(self, name: str) -> Callable[..., Any]:
        def watch(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if not torch.compiler.is_compiling():
                counts = self.nhwc if output.is_contiguous(memory_format=torch.channels_last) else self.other
                counts[name] = counts.get(name, 0) + 1
            return output

        return watch


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


def _networks(target: Target) -> Iterable[tuple[str, nn.Module]]:
    """The U-Nets and the VAE, as far as they have two-dimensional convolutions to re-stride."""
    candidates = [(d.name, d.module) for d in target.denoisers if d.spec.unet is not None]
    if target.vae is not None:
        candidates.append(("vae", target.vae))
    return [(name, network) for name, network in candidates if _inner_convolutions(network)]


def _inner_convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """Convolutions with a kernel larger than 1x1: for 1x1 weights both layouts are the same."""
    return [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
