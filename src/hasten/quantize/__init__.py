"""Quantization of weights and activations, and adapters beside quantized weights."""

from hasten.quantize.awq import AWQ
from hasten.quantize.bits_and_bytes import BitsAndBytes
from hasten.quantize.diagnosis import diagnose as diagnose
from hasten.quantize.float8_linear import Float8Linear
from hasten.quantize.gguf import GGUF
from hasten.quantize.gptq import GPTQ
from hasten.quantize.hadamard_rotation import HadamardRotation
from hasten.quantize.int4_linear import Int4Linear
from hasten.quantize.int8_linear import Int8Linear
from hasten.quantize.lora import LoRA
from hasten.quantize.mixed_precision import MixedPrecision
from hasten.quantize.smooth_quant import SmoothQuant
from hasten.quantize.svd_quant import SVDQuant
from hasten.quantize.weight_only import WeightOnly

__all__ = [
    "AWQ",
    "GGUF",
    "GPTQ",
    "BitsAndBytes",
    "Float8Linear",
    "HadamardRotation",
    "Int4Linear",
    "Int8Linear",
    "LoRA",
    "MixedPrecision",
    "SVDQuant",
    "SmoothQuant",
    "WeightOnly",
]
