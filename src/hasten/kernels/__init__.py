"""Numerics that several families share: quantized weights, how they are stored, and products with them."""
