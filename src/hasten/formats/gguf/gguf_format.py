"""GGUF as one of hasten's formats, and what it does with which weight."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from hasten.core.errors import UnknownName
from hasten.formats.format import Entry, Format, Reader, Writer
from hasten.formats.gguf.header import MAGIC
from hasten.formats.gguf.quantizing import QUANTIZERS, fitting, quantize
from hasten.formats.gguf.reader import GGUFReader
from hasten.formats.gguf.writer import GGUFWriter, holds

SMALL = 1024
"""Weights of so many numbers stay in 32 bits, as in ComfyUI-GGUF."""
HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Mix:
    """More bits for the layers that need them most: what llama.cpp calls S, M and L."""

    rest: str
    fused: str
    """Of one matrix for query, key and value."""
    value: str
    """Of attention's values."""
    down: str
    """Of the second linear of a feed-forward network."""

    def kind(self, name: str) -> str:
        """The type for a weight by the role that its name tells."""
        roles = ((_FUSED, self.fused), (_VALUE, self.value), (_DOWN, self.down))
        return next((kind for pattern, kind in roles if pattern.search(name)), self.rest)


_FUSED = re.compile(r"(^|[._])(qkv|qkv_proj|in_proj|to_qkv|to_added_qkv)(\.weight|_weight)?$")
_VALUE = re.compile(r"(^|[._])(to_v|v_proj|attn_v|v|value)(\.weight)?$")
_DOWN = re.compile(
    r"(^|[._])(ff(n|_context)?\.net\.2|ffn\.2|(img_|txt_)?mlp\.2|mlp\.fc2|ffn_down|down_proj|w2|wo)(\.weight)?$"
)

MIXES = {
    "Q3_K_M": Mix("Q3_K", "Q4_K", "Q5_K", "Q4_K"),
    "Q4_K_M": Mix("Q4_K", "Q5_K", "Q6_K", "Q6_K"),
    "Q5_K_M": Mix("Q5_K", "Q6_K", "Q6_K", "Q6_K"),
}


class GGUFFormat(Format):
    """Files of ggml, llama.cpp, stable-diffusion.cpp and ComfyUI-GGUF: each tensor in a type of its own.

    All types are read without loss. Bytes come back as they were for those that can be written; of IQ1, IQ2 and IQ3
    the values do. See https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
    """

    name: ClassVar[str] = "gguf"
    kinds: ClassVar[tuple[str, ...]] = (*QUANTIZERS, *MIXES, *HALVES)

    def recognizes(self, path: Path) -> bool:
        """By its first four bytes."""
        try:
            with path.open("rb") as file:
                return file.read(4) == MAGIC
        except OSError:
            return False

    def open(self, path: Path) -> Reader:
        """Map a file and check its header; raises BadFile."""
        return GGUFReader(path)

    def create(self, path: Path, names: Sequence[str], metadata: Mapping[str, Any]) -> Writer:
        """Begin a file. Of metadata, `general.architecture` is what most programs want to see."""
        return GGUFWriter(path, names, metadata)

    def accepts(self, entry: Entry) -> bool:
        """Plain tensors, and codes that are exactly those of one of the types."""
        return holds(entry)

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """Quantize a weight to a type, or to a mix (Q4_K_M) that gives values and second linears more bits.

        Weights of one dimension or up to 1024 numbers become F32, and weights outside of numbered blocks (embeddings,
        first and last projections) stay as they are. Where blocks do not divide the inputs of a row they run on over
        rows, with the true shape as ComfyUI-GGUF notes it; where they do not divide the weight a type with blocks of
        32 is taken, and else F16.
        """
        if kind not in self.kinds:
            raise UnknownName("GGUF type", kind, self.kinds)
        if not weight.is_floating_point():
            return Entry(weight)
        if weight.ndim < 2 or weight.numel() <= SMALL:
            return Entry(weight.float())
        if kind in HALVES:
            return Entry(_halved(weight, HALVES[kind]))
        if not _in_blocks(name):
            return Entry(weight)
        exact = MIXES[kind].kind(name) if kind in MIXES else kind
        if fitting(exact, tuple(weight.shape)) is None:
            return Entry(_halved(weight, torch.float16))
        return Entry(quantize(weight, exact))


def _in_blocks(name: str) -> bool:
    """Is a part of the name a number? A bare name, which says nothing, counts as one in a block."""
    parts = name.split(".")
    return len(parts) == 1 or any(part.isdigit() for part in parts)


def _halved(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In 16 bits, unless numbers would become infinite."""
    found = weight.to(dtype)
    return found if bool(found.isfinite().all()) or not bool(weight.isfinite().all()) else weight
