"""Kernels in Triton for GPUs. Nothing here is imported before a product on a GPU asks for it."""
