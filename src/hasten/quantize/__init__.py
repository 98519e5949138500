"""Quantization of weights and activations."""

from hasten.quantize.hadamard_rotation import HadamardRotation
from hasten.quantize.int8_linear import Int8Linear
from hasten.quantize.weight_only import WeightOnly

__all__ = ["HadamardRotation", "Int8Linear", "WeightOnly"]
