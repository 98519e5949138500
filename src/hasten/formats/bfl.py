"""Files of Black Forest Labs in 8-bit floats by row (fp8r) and NVFP4, and those that NVIDIA ModelOpt exports."""

from __future__ import annotations

from typing import ClassVar

import torch

from hasten.formats.format import Entry
from hasten.formats.fp4 import quantize_nvfp4
from hasten.formats.mapped import TensorFile
from hasten.formats.scaled import FLOAT8, Scaled
from hasten.formats.tensors import chosen, coded, is_linear
from hasten.kernels.modules import Input
from hasten.kernels.rounding import quantize_float8


class BFL(Scaled):
    """`weight` e4m3 with `weight_scale` float32 [outputs]; activations are rounded to 8-bit floats token by token.

    NVFP4: `weight` uint8 [outputs, inputs / 2], `weight_scale` e4m3 [outputs, inputs / 16], `weight_scale_2` and
    `input_scale` float32. The 4-bit activations of these files are computed with 8 bits.
    """

    name: ClassVar[str] = "bfl"
    kinds: ClassVar[tuple[str, ...]] = ("fp8r", "nvfp4")
    rounds: ClassVar[bool] = True

    def claims(self, file: TensorFile) -> bool:
        """Files whose 8-bit weights all have a scale for each row."""
        scales = [name for name in file.names() if name.endswith(".weight_scale")]
        return bool(scales) and all(_by_row(file, name) for name in scales)

    def fits(self, entry: Entry) -> bool:
        """Rows alone have scales."""
        rows = coded(entry).scale.codes.shape == (coded(entry).shape[0], 1)
        return super().fits(entry) and rows and coded(entry).scale.codes.dtype == torch.float32

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """Round matrices in blocks; what is no such matrix stays plain."""
        if not is_linear(name, weight):
            return Entry(weight)
        if chosen(kind, self) == "nvfp4":
            return Entry(quantize_nvfp4(weight))
        return Entry(quantize_float8(weight), Input(activations="float8"))


class ModelOpt(Scaled):
    """`weight` with a scale of the tensor, `weight_scale`, and a fixed one of its input, `input_scale`; or NVFP4."""

    name: ClassVar[str] = "modelopt"
    kinds: ClassVar[tuple[str, ...]] = ("fp8", "nvfp4")

    def claims(self, file: TensorFile) -> bool:
        """Files with an 8-bit weight and its scale."""
        bases = [name.removesuffix("_scale") for name in file.names() if name.endswith(".weight_scale")]
        return any(base in file and file.info(base).dtype in (*FLOAT8, "U8") for base in bases)

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """Round matrices in blocks; what is no such matrix stays plain."""
        if not is_linear(name, weight):
            return Entry(weight)
        return Entry(
            quantize_nvfp4(weight) if chosen(kind, self) == "nvfp4" else quantize_float8(weight, block="tensor")
        )


def _by_row(file: TensorFile, name: str) -> bool:
    weight = name.removesuffix("_scale")
    if weight not in file:
        return False
    info, scale = file.info(weight), file.info(name)
    rows = info.dtype == "F8_E4M3" and scale.dtype == "F32" and scale.shape == info.shape[:1] and info.shape[0] > 1
    return rows or (info.dtype == "U8" and f"{weight}_scale_2" in file and scale.dtype == "F8_E4M3")
