"""All formats by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from hasten.formats.bfl import BFL, ModelOpt
from hasten.formats.bitsandbytes import BitsAndBytes
from hasten.formats.comfy.format import ComfyQuant
from hasten.formats.format import Format
from hasten.formats.fp8_scaled import Fp8Scaled
from hasten.formats.gguf import GGUFFormat
from hasten.formats.nunchaku.format import Nunchaku, NunchakuLite
from hasten.formats.own import Own
from hasten.formats.packed import AWQ, GPTQ
from hasten.formats.plain import PlainSafetensors
from hasten.formats.torchao import TorchAO


@functools.cache
def formats() -> Mapping[str, Format]:
    """All formats by name, the most particular first: a file is read by the first that recognizes it."""
    found: list[Format] = [
        GGUFFormat(),
        Own(),
        TorchAO(),
        ComfyQuant(),
        Fp8Scaled(),
        BitsAndBytes(),
        NunchakuLite(),
        Nunchaku(),
        GPTQ(),
        AWQ(),
        BFL(),
        ModelOpt(),
        PlainSafetensors(),
    ]
    return MappingProxyType({item.name: item for item in found})
