"""Quantization of weights and activations."""

from hasten.quantize.awq import AWQ
from hasten.quantize.gptq import GPTQ
from hasten.quantize.int8_linear import Int8Linear
from hasten.quantize.svd_quant import SVDQuant
from hasten.quantize.weight_only import WeightOnly

__all__ = ["AWQ", "GPTQ", "Int8Linear", "SVDQuant", "WeightOnly"]
