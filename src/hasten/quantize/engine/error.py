"""The error that a quantized layer makes, from the statistics of its inputs alone."""

from __future__ import annotations

import torch

from hasten.kernels.modules import Quantized
from hasten.kernels.weight import QuantizedWeight
from hasten.quantize.engine.statistics import quadratic


def output_error(
    weight: torch.Tensor, quantized: Quantized | QuantizedWeight | torch.Tensor, second: torch.Tensor
) -> float:
    """The squared error of a layer's output when its weight is kept otherwise: summed over outputs, mean over tokens.

    It is exact for rounded weights; what rounded activations add comes on top. Where only blocks of the second
    moments were kept, what connects different blocks is left out.

    Args:
        weight: [outputs, inputs] or that of a 1 x 1 convolution.
        quantized: what stands in its place: a layer (smoothing, rotation and side branch count), a weight in codes,
            or the numbers themselves.
        second: [blocks, size, size], the mean of x x^T over tokens; see `InputStatistics`.
    """
    change = weight.detach().reshape(weight.shape[0], -1).float() - _matrix(quantized)
    return float(quadratic(change, second).sum())


def relative_error(
    weight: torch.Tensor, quantized: Quantized | QuantizedWeight | torch.Tensor, second: torch.Tensor
) -> float:
    """The same relative to the mean square of the output; 0 for an output that is always 0."""
    whole = float(quadratic(weight.detach().reshape(weight.shape[0], -1), second).sum())
    return output_error(weight, quantized, second) / whole if whole > 0 else 0.0


def _matrix(quantized: Quantized | QuantizedWeight | torch.Tensor) -> torch.Tensor:
    if isinstance(quantized, Quantized):
        found = quantized.effective()
    else:
        found = quantized.dequantize() if isinstance(quantized, QuantizedWeight) else quantized
    return found.detach().reshape(found.shape[0], -1).float()
