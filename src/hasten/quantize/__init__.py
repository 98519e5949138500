"""Quantization of weights and activations."""

__all__: list[str] = []
