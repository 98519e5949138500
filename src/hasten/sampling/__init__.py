"""Samplers and schedules."""

__all__: list[str] = []
