"""Plain safetensors: every tensor as it is, in one file or in several with an index."""

from __future__ import annotations

from typing import ClassVar

import torch

from hasten.formats.format import Entry
from hasten.formats.mapped import TensorFile
from hasten.formats.tensors import TensorFormat, chosen


class PlainSafetensors(TensorFormat):
    """Weights that are not quantized, in files as diffusers and others write them; also bare 8-bit floats."""

    name: ClassVar[str] = "safetensors"
    kinds: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")

    def claims(self, file: TensorFile) -> bool:
        """Every safetensors file: the format comes last."""
        return True

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """Cast to the type; integers stay integers."""
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[chosen(kind, self)]
        return Entry(weight.to(dtype) if weight.is_floating_point() else weight)
