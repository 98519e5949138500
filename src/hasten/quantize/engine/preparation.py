"""What is done to the input of a layer before it meets the codes, seen from the weight and from the statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hasten.kernels.activations import Activations
from hasten.kernels.modules import Input
from hasten.kernels.prepared import prepare_weight, raw_weight
from hasten.quantize.engine.sites import Site
from hasten.quantize.engine.statistics import InputStatistics


@dataclass(frozen=True)
class Preparation:
    """Inputs are divided by `smooth`, [inputs], then rotated in groups."""

    smooth: torch.Tensor | None = None
    rotation: int = 1

    @classmethod
    def of(cls, site: Site) -> Preparation:
        """What other techniques of the recipe have put in the place already."""
        if site.wrapper is None:
            return cls()
        smooth = site.wrapper.smooth
        return cls(None if smooth is None else smooth.float(), site.wrapper.rotation)

    def smoothed(self, smooth: torch.Tensor) -> Preparation:
        """With other factors, for inputs as they come."""
        return replace(self, smooth=smooth)

    def weight(self, raw: torch.Tensor) -> torch.Tensor:
        """The weight for prepared inputs of one for inputs as they come, [outputs, inputs] float32."""
        return prepare_weight(raw, self.smooth, self.rotation)

    def raw(self, prepared: torch.Tensor) -> torch.Tensor:
        """The inverse of `weight`."""
        return raw_weight(prepared, self.smooth, self.rotation)

    def statistics(self, known: InputStatistics) -> InputStatistics:
        """Statistics of prepared inputs from those of inputs as they come."""
        divided = known if self.smooth is None else known.divided(self.smooth)
        return divided if self.rotation == 1 else divided.rotated(self.rotation)

    def given(self, kind: torch.dtype, activations: Activations = "none") -> Input:
        """The same for a quantized layer, with factors of type `kind`."""
        smooth = None if self.smooth is None else self.smooth.to(kind)
        return Input(smooth=smooth, rotation=self.rotation, activations=activations)


def raw_matrix(site: Site) -> torch.Tensor:
    """The weight of a place for inputs as they come, [outputs, inputs] float32."""
    return site.raw_weight.reshape(site.weight.shape[0], -1)
