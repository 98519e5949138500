"""Quantization of weights and activations."""

from hasten.quantize.bits_and_bytes import BitsAndBytes
from hasten.quantize.float8_linear import Float8Linear
from hasten.quantize.hadamard_rotation import HadamardRotation
from hasten.quantize.int4_linear import Int4Linear
from hasten.quantize.int8_linear import Int8Linear
from hasten.quantize.weight_only import WeightOnly

__all__ = ["BitsAndBytes", "Float8Linear", "HadamardRotation", "Int4Linear", "Int8Linear", "WeightOnly"]
