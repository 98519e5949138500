"""Kernels in Triton for GPUs. Nothing here is imported before work on a GPU asks for it."""
