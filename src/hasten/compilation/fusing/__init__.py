"""Runs blocks from their declarations, with fused kernels between the products."""
