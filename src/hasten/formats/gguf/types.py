"""All types of GGUF's tensors by name and by number."""

from __future__ import annotations

import torch

from hasten.formats.gguf import codebooks, layouts
from hasten.formats.gguf.blocks import BlockType
from hasten.kernels.weight import QuantizedWeight

PLAIN: dict[int, tuple[str, torch.dtype]] = {
    0: ("F32", torch.float32),
    1: ("F16", torch.float16),
    24: ("I8", torch.int8),
    25: ("I16", torch.int16),
    26: ("I32", torch.int32),
    27: ("I64", torch.int64),
    28: ("F64", torch.float64),
    30: ("BF16", torch.bfloat16),
}
"""Numbers of the types without blocks, their names and what they are in PyTorch."""

IQ4 = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.float32)
"""The 4-bit floats of MXFP4 and NVFP4, doubled; their scales are halved. Both zeros are +0."""
TERNARY = torch.tensor([-1.0, 0.0, 1.0, 0.0])


def _halved_exponents() -> torch.Tensor:
    """2**(e - 128) for each byte; the first two are subnormal."""
    bits = [0x200000 << e if e < 2 else (e - 1) << 23 for e in range(256)]
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def _halved_e4m3() -> torch.Tensor:
    """Half of an 8-bit float whose sign is not looked at, for each byte; 0x7F, which is no number, is 0."""
    found = [(m / 8 if not e else 1 + m / 8) * 2.0 ** (max(e, 1) - 8) for e in range(16) for m in range(8)]
    return torch.tensor([*found[:127], 0.0, *found])


_IQ2, _IQ3 = codebooks.signed_table(codebooks.IQ2_LEVELS), codebooks.signed_table(codebooks.IQ3_XXS_LEVELS)
_IQ3_S, _IQ1 = codebooks.signed_table(codebooks.IQ3_S_LEVELS), codebooks.shifted_table()
_ODD = torch.arange(16) * 2.0 + 1
_HALVES = torch.arange(16) + 0.5

E8M0, UE4M3 = _halved_exponents(), _halved_e4m3()

TYPES = (
    BlockType("Q4_0", 2, 32, 18, "int4", 1, layouts.read_q4_0, layouts.write_q4_0),
    BlockType("Q4_1", 3, 32, 20, "uint4", 1, layouts.read_q4_1, layouts.write_q4_1, minimum=True),
    BlockType("Q5_0", 6, 32, 22, "int5", 1, layouts.read_q5_0, layouts.write_q5_0),
    BlockType("Q5_1", 7, 32, 24, "uint5", 1, layouts.read_q5_1, layouts.write_q5_1, minimum=True),
    BlockType("Q8_0", 8, 32, 34, "int8", 1, layouts.read_q8_0, layouts.write_q8_0),
    BlockType("Q2_K", 10, 256, 84, "uint2", 16, layouts.read_q2_k, layouts.write_q2_k,
              scale_range=(0, 15), nested=True, minimum=True),
    BlockType("Q3_K", 11, 256, 110, "int3", 16, layouts.read_q3_k, layouts.write_q3_k,
              scale_range=(-32, 31), nested=True),
    BlockType("Q4_K", 12, 256, 144, "uint4", 8, layouts.read_q4_k, layouts.write_q4_k,
              scale_range=(0, 63), nested=True, minimum=True),
    BlockType("Q5_K", 13, 256, 176, "uint5", 8, layouts.read_q5_k, layouts.write_q5_k,
              scale_range=(0, 63), nested=True, minimum=True),
    BlockType("Q6_K", 14, 256, 210, "int6", 16, layouts.read_q6_k, layouts.write_q6_k,
              scale_range=(-128, 127), nested=True),
    BlockType("IQ4_NL", 20, 32, 18, "table4", 1, layouts.read_q4_0, layouts.write_q4_0, IQ4),
    BlockType("IQ4_XS", 23, 256, 136, "table4", 8, layouts.read_iq4_xs, layouts.write_iq4_xs, IQ4,
              scale_range=(-32, 31), nested=True),
    BlockType("MXFP4", 39, 32, 17, "table4", 1, layouts.read_mxfp4, layouts.write_mxfp4, E2M1, E8M0),
    BlockType("NVFP4", 40, 64, 36, "table4", 4, layouts.read_nvfp4, layouts.write_nvfp4, E2M1, UE4M3),
    BlockType("TQ1_0", 34, 256, 54, "table2", 1, layouts.read_tq1_0, layouts.write_tq1_0, TERNARY),
    BlockType("TQ2_0", 35, 256, 66, "uint2", 1, layouts.read_tq2_0, layouts.write_tq2_0, zero=1),
    BlockType("IQ2_XXS", 16, 256, 66, "table3", 8, codebooks.read_iq2_xxs, None, _IQ2, _HALVES / 4, nested=True),
    BlockType("IQ2_XS", 17, 256, 74, "table3", 16, codebooks.read_iq2_xs, None, _IQ2, _HALVES / 4, nested=True),
    BlockType("IQ2_S", 22, 256, 82, "table3", 16, codebooks.read_iq2_s, None, _IQ2, _HALVES / 4, nested=True),
    BlockType("IQ3_XXS", 18, 256, 98, "table4", 8, codebooks.read_iq3_xxs, None, _IQ3, _HALVES / 2, nested=True),
    BlockType("IQ3_S", 21, 256, 110, "table4", 8, codebooks.read_iq3_s, None, _IQ3_S, _ODD, nested=True),
    BlockType("IQ1_S", 19, 256, 50, "table3", 8, codebooks.read_iq1_s, None, _IQ1, _ODD, nested=True),
    BlockType("IQ1_M", 29, 256, 56, "table3", 16, codebooks.read_iq1_m, None, _IQ1, _ODD, nested=True),
)  # fmt: skip
"""All types of blocks that hasten reads."""

BY_NAME = {kind.name: kind for kind in TYPES}
BY_ID = {kind.id: kind for kind in TYPES}


def type_of(weight: QuantizedWeight) -> BlockType | None:
    """The type that stores a weight exactly as it is, or None."""
    return next((kind for kind in TYPES if kind.holds(weight)), None)
