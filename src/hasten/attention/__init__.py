"""Attention: which kernel computes it, and a function for one's own models."""

from hasten.attention.backend import AttentionBackend
from hasten.attention.bias import BlockDiagonal as BlockDiagonal
from hasten.attention.bias import LocalFromBottomRight as LocalFromBottomRight
from hasten.attention.bias import LowerTriangular as LowerTriangular
from hasten.attention.bias import LowerTriangularFromBottomRight as LowerTriangularFromBottomRight
from hasten.attention.diagnosis import diagnose as diagnose
from hasten.attention.eight_bit import EightBitAttention
from hasten.attention.function import attend as attend
from hasten.attention.fused_qkv import FusedQKV

__all__ = ["AttentionBackend", "EightBitAttention", "FusedQKV"]
