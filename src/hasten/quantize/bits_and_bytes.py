"""Keeps the weights of linear layers as bitsandbytes does, with that library or without it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import torch
from torch import nn

from hasten.core.target import Target
from hasten.core.technique import about
from hasten.kernels.bitsandbytes import BLOCK, quantize_4bit, quantize_8bit
from hasten.kernels.modules import Input
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.library import library_layer
from hasten.quantize.engine.linear_quantizer import LinearQuantizer
from hasten.quantize.engine.sites import Site


@dataclass(frozen=True, kw_only=True)
class BitsAndBytes(LinearQuantizer):
    """Keeps weights in 4 bits (QLoRA's NF4 or FP4) or 8 (LLM.int8), with the very codes of the library bitsandbytes.

    With 4 bits the weights are widened in each call, so it saves memory and no time. With 8 bits activations are
    rounded as well, except for channels in which a magnitude reaches `threshold`: these have a second product, which
    always runs, so that nothing waits for the GPU; `threshold=0` leaves it out, and is faster.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2305.14314"
    uniform: ClassVar[bool] = True

    bits: Literal[4, 8] = field(default=4, metadata=about("bits of a code"))
    quant_type: Literal["nf4", "fp4"] = field(
        default="nf4", metadata=about("4 bits: codes stand for quantiles of the normal distribution, or for floats")
    )
    double_quant: bool = field(default=True, metadata=about("4 bits: scales are coded with 8 bits themselves"))
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata=about("4 bits: type in which products are computed; auto: the type of the input")
    )
    threshold: float = field(
        default=6.0, metadata=about("8 bits: channels with such magnitudes are not rounded; 0: all are", ge=0)
    )
    skip_modules: tuple[str, ...] = field(
        default=(), metadata=about("layers that stay as they are, as the beginning or the last part of their paths")
    )
    backend: Literal["hasten", "library"] = field(
        default="hasten", metadata=about("whose layers compute: hasten's, or those of bitsandbytes where installed")
    )

    def takes(self, target: Target) -> list[Site]:
        """The layers that are quantized."""
        return [site for site in super().takes(target) if not self._skipped(site.path)]

    def _skipped(self, path: str) -> bool:
        return any(f"{path}.".startswith(f"{name}.") or f".{path}".endswith(f".{name}") for name in self.skip_modules)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs what every quantizer needs, and for the library's layers the library, and sizes that it can do."""
        yield from super().problems(target)
        if self.backend == "hasten":
            return
        if importlib.util.find_spec("bitsandbytes") is None:
            yield (
                "bitsandbytes is not installed: pip install 'bitsandbytes>=0.46'; "
                'without it, backend="hasten" makes the same codes.'
            )
        elif self.bits == 4 and target.device.type == "cpu" and any(map(_uneven, self.takes(target))):
            yield (
                "on a CPU the 4-bit layers of bitsandbytes need inputs that 64 divides and outputs that 32 divides; "
                'backend="hasten" takes all, or name the other layers in skip_modules.'
            )

    def quantize(self, site: Site) -> nn.Module:
        """Round the weight in blocks of 64 that run over its rows, or row by row."""
        dtype = None if self.compute_dtype == "auto" else cast(torch.dtype, getattr(torch, self.compute_dtype))
        if self.backend == "library" and site.weight.device.type != "meta":
            return library_layer(site, self.bits, self.quant_type, self.double_quant, dtype, self.threshold)
        if self.bits == 4:
            weight = quantize_4bit(site.weight, self.quant_type, double=self.double_quant)
            return quantized_layer(site, weight, Input(compute=dtype))
        return quantized_layer(site, quantize_8bit(site.weight), Input(activations="int8", threshold=self.threshold))


def _uneven(site: Site) -> bool:
    outputs, inputs = site.weight.shape
    return bool(outputs % 32 or inputs % BLOCK)
