"""Compilation and memory layout."""

from hasten.compilation.blocks import CompileBlocks
from hasten.compilation.channels_last import ChannelsLast

__all__ = ["ChannelsLast", "CompileBlocks"]
