"""Quantization of weights and activations, and adapters beside quantized weights."""

from hasten.quantize.int8_linear import Int8Linear
from hasten.quantize.lora import LoRA
from hasten.quantize.weight_only import WeightOnly

__all__ = ["Int8Linear", "LoRA", "WeightOnly"]
