"""A workload: which pictures are made, so that every recipe makes the same ones."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Self, cast

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
        object.__setattr__(self, "prompts", _several(self.prompts, str, "prompts must be a list of texts"))
        object.__setattr__(self, "seeds", _several(self.seeds, int, "seeds must be a list of whole numbers"))
        for name in ("steps", "batch"):
            number = getattr(self, name)
            if not isinstance(number, int) or number < 1:
                raise InvalidSetting(f"{name} must be a whole number of at least 1, not {number!r}.")
        for name in ("width", "height"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or size < 16 or size % 8):
                raise InvalidSetting(f"{name} must be a multiple of 8 and at least 16 pixels, not {size!r}.")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InvalidSetting(f"guidance must be a finite number, not {self.guidance!r}.")
        if not self.seeds:
            raise InvalidSetting("A workload needs at least one seed.")

    @property
    def images(self) -> int:
        """How many pictures one pass over the workload makes."""
        return len(self.prompts) * len(self.seeds)

    def replace(self, **changes: object) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]


def _several(values: object, kind: type, problem: str) -> tuple[object, ...]:
    # A single text is a sequence as well, of letters: it must not pass for a list of prompts.
    items = cast("list[object]", values) if isinstance(values, list | tuple) else None
    if items is None or not all(isinstance(item, kind) for item in items):
        raise InvalidSetting(f"{problem}, not {values!r}.")
    return tuple(items)
