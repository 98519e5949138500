"""Several devices working on one picture."""

__all__: list[str] = []
