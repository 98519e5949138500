"""File formats of model weights, read and written: each maps into `kernels.weight.QuantizedWeight` without loss."""

from hasten.formats.registry import formats

__all__ = ["formats"]
