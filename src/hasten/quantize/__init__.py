"""Quantization of weights and activations."""

from hasten.quantize.gguf import GGUF
from hasten.quantize.int8_linear import Int8Linear
from hasten.quantize.weight_only import WeightOnly

__all__ = ["GGUF", "Int8Linear", "WeightOnly"]
