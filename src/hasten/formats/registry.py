"""All formats by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from hasten.formats.format import Format
from hasten.formats.gguf import GGUFFormat


@functools.cache
def formats() -> Mapping[str, Format]:
    """All formats by name, the most particular first: a file is read by the first that recognizes it."""
    found: list[Format] = [GGUFFormat()]
    return MappingProxyType({item.name: item for item in found})
