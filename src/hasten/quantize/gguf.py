"""Keeps the weights of linear layers in the types of GGUF files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import nn

from hasten.core.session import Session
from hasten.core.technique import Evidence, about
from hasten.formats.gguf.gguf_format import MIXES
from hasten.formats.gguf.quantizing import quantize
from hasten.formats.gguf.types import type_of
from hasten.kernels.modules import Quantized
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.linear_quantizer import LinearQuantizer, Replaced
from hasten.quantize.engine.sites import Site


@dataclass(frozen=True, kw_only=True)
class GGUF(LinearQuantizer):
    """Quantizes weights to a type of ggml (2 to 8 bits) in memory: what a GGUF file of that type would hold.

    K-quants (Q2_K to Q6_K) have blocks of 256 numbers with scales that are codes themselves, found by a search, and
    lose less than the older types of the same size. Where 256 does not divide a layer's inputs, blocks run on over
    rows; where it does not divide the weight, a type with blocks of 32 is taken (Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0
    for Q6_K, IQ4_NL for the others), which the evidence tells. Mixes (Q4_K_M) give more bits to attention's values and
    to the second linears of feed-forward networks, by the names of layers. No data is needed.
    """

    paper: ClassVar[str] = "https://github.com/ggml-org/llama.cpp/pull/1684"
    convolutions: ClassVar[bool] = True

    type: Literal[
        "Q4_K", "Q8_0", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL", "Q5_1", "Q5_0", "Q4_1", "Q4_0",
        "MXFP4", "NVFP4", "TQ2_0", "TQ1_0", "Q3_K_M", "Q4_K_M", "Q5_K_M",
    ] = field(
        default="Q4_K", metadata=about("type of the weights, as in the names of GGUF files", trial="Q4_0")
    )  # fmt: skip

    def quantize(self, site: Site) -> Quantized:
        """Quantize the weight to the type, or to the one that the mix has for the layer."""
        kind = MIXES[self.type].kind(f"{site.path}.weight") if self.type in MIXES else self.type
        return quantized_layer(site, quantize(site.weight, kind))

    def describe(self, module: nn.Module) -> str:
        """Names the type."""
        return f"weight is kept as {_type_name(module)}"

    def engaged(self, session: Session) -> Evidence:
        """As for all quantizers, with the types that layers got."""
        found = super().engaged(session)
        counts = Counter(_type_name(module) for _, module in session.state(self, Replaced).places)
        types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        return replace(found, summary=f"{found.summary}; types: {types}")


def _type_name(module: nn.Module) -> str:
    assert isinstance(module, Quantized)
    kind = type_of(module.quantized)
    return kind.name if kind else module.number
