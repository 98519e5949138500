"""A workload: which pictures are made, so that every recipe makes the same ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from hasten.core.errors import InvalidSetting


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Prompts, seeds and sampling settings of a run. Sizes in pixels; one image per prompt and seed."""

    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    width: int | None = None
    height: int | None = None
    steps: int = 28
    guidance: float | None = None
    max_sequence_length: int | None = None
    """Text tokens for pipelines that pad (FLUX pads to 512 unless told otherwise); None leaves the default."""
    batch: int = 1
    """Pictures per call of the pipeline."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise InvalidSetting(f"{name} must be at least 1, not {getattr(self, name)}.")
        for name in ("width", "height"):
            size = getattr(self, name)
            if size is not None and (size < 16 or size % 8):
                raise InvalidSetting(f"{name} must be a multiple of 8 and at least 16 pixels, not {size}.")
        if not self.seeds:
            raise InvalidSetting("A workload needs at least one seed.")

    @property
    def images(self) -> int:
        """How many pictures one pass over the workload makes."""
        return len(self.prompts) * len(self.seeds)

    def replace(self, **changes: object) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]
