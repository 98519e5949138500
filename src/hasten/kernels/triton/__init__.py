"""Kernels in Triton's language; each has an eager reference, and is imported only where it is to run."""
