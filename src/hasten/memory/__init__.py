"""Offload, device maps and other ways to need less memory."""

__all__: list[str] = []
