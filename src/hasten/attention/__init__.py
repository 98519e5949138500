"""Attention: which kernel computes it."""

from hasten.attention.backend import AttentionBackend

__all__ = ["AttentionBackend"]
