"""Calibration of quantizers, choice of bits by layer, and the gate that a quantized pipeline has to pass."""
