"""Compilation and memory layout."""

from hasten.compilation.blocks import CompileBlocks
from hasten.compilation.channels_last import ChannelsLast
from hasten.compilation.cuda_graphs import CudaGraphs
from hasten.compilation.fused_blocks import FusedBlocks
from hasten.compilation.warm_up import warm_up
from hasten.compilation.whole import CompileWhole

__all__ = ["ChannelsLast", "CompileBlocks", "CompileWhole", "CudaGraphs", "FusedBlocks", "warm_up"]
