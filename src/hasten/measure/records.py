"""The records of `comparison.json`: frozen, with known fields only, and without NaN or infinite numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from hasten.core.errors import HastenError

Status = Literal["ok", "refused", "failed", "interrupted"]
Kind = Literal["baseline", "recipe", "fewer_steps", "other_solver"]
Fact = str | bool | int | float | None


class Record(BaseModel):
    """Frozen, with known fields and finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Timing(Record):
    """Wall-clock seconds per image; `runs` holds every timed run, warm-up and set-up excluded."""

    median: PositiveFloat
    min: PositiveFloat
    max: PositiveFloat
    runs: tuple[PositiveFloat, ...]

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        """Summarise the seconds per image of each run."""
        runs = tuple(seconds)
        if not runs:
            raise HastenError("A timing needs at least one timed run.")
        return cls(median=statistics.median(runs), min=min(runs), max=max(runs), runs=runs)

    def overlaps(self, other: Timing) -> bool:
        """True when the ranges of both touch, so that their order may be chance."""
        return self.min <= other.max and other.min <= self.max


class Steps(Record):
    """Denoising steps of one image: computed in full, and partly or wholly reused; means over all images."""

    full: NonNegativeInt | NonNegativeFloat
    reused: NonNegativeInt | NonNegativeFloat


class _FidelityLike(Protocol):
    @property
    def psnr(self) -> float: ...
    @property
    def ssim(self) -> float: ...
    @property
    def lpips(self) -> float: ...
    @property
    def lpips_resolution(self) -> int: ...


class FidelityRecord(Record):
    """Mean distance from the plain images.

    PSNR in dB (an infinite one becomes null and `identical`), LPIPS at a short side of `lpips_resolution` px.
    """

    psnr: float | None
    ssim: float | None = None
    lpips: float | None = None
    lpips_resolution: PositiveInt | None = None
    identical: bool = False

    @model_validator(mode="before")
    @classmethod
    def _infinite_is_identical(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("psnr") == math.inf:
            return {**values, "psnr": None, "identical": True}
        return values

    @model_validator(mode="after")
    def _null_means_identical(self) -> Self:
        if (self.psnr is None) != self.identical:
            raise ValueError("psnr is null exactly when the images are identical")
        return self

    @classmethod
    def of(cls, found: _FidelityLike) -> FidelityRecord:
        """Take over a measured `hasten.measure.quality.Fidelity`, whose PSNR may be infinite."""
        values = {name: getattr(found, name) for name in ("psnr", "ssim", "lpips", "lpips_resolution")}
        return cls.model_validate(values)

    @property
    def decibels(self) -> float:
        """PSNR in dB, infinite for identical images."""
        return math.inf if self.psnr is None else self.psnr


class Phases(Record):
    """Seconds per image spent in each part of the pipeline."""

    text_encoder: NonNegativeFloat
    denoise: NonNegativeFloat
    vae: NonNegativeFloat


class Row(Record):
    """One recipe and what it did: how fast, how close to the plain images, and the proof that it took effect.

    `images` has one path per prompt and seed (all seeds of the first prompt first), relative to the folder
    of `comparison.json`; a row that did not finish may hold fewer. `step_map` names each branch ("cond",
    "uncond", or "") and says for every step of one image whether it was computed in full. `changes`
    is the patch log.
    """

    name: Annotated[str, Field(min_length=1)]
    recipe: str
    kind: Kind = "recipe"
    status: Status
    reason: str | None = None
    seconds_per_image: Timing | None = None
    speedup: PositiveFloat | None = None
    setup_seconds: NonNegativeFloat | None = None
    pays_off_after_images: NonNegativeInt | None = None
    peak_memory_bytes: NonNegativeInt | None = None
    steps: Steps | None = None
    fidelity: FidelityRecord | None = None
    noise_floor: FidelityRecord | None = None
    difference: str | None = None
    engaged: tuple[str, ...] = ()
    phases: Phases | None = None
    images: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    step_map: dict[str, tuple[bool, ...]] | None = None

    @field_validator("images")
    @classmethod
    def _stay_in_the_folder(cls, images: tuple[str, ...]) -> tuple[str, ...]:
        for image in images:
            if not _is_inside(image):
                raise ValueError(f"{image!r} is not a relative path inside the folder of comparison.json")
        return images

    @model_validator(mode="after")
    def _explained(self) -> Self:
        if self.status in ("refused", "failed") and not self.reason:
            raise ValueError(f"a row that is {self.status} needs a reason")
        return self


class WorkloadRecord(Record):
    """What every row had to do: same prompts, same seeds, same size."""

    model: str
    denoiser: str
    dtype: str
    device: str
    width: PositiveInt
    height: PositiveInt
    steps: PositiveInt
    guidance: float | None = None
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    max_sequence_length: PositiveInt | None = None
    runs: PositiveInt


def _is_inside(path: str) -> bool:
    windows = PureWindowsPath(path)
    parts = PurePosixPath(path.replace("\\", "/")).parts
    rooted = windows.is_absolute() or bool(windows.drive) or path.startswith(("/", "\\"))
    return bool(parts) and ".." not in parts and not rooted and "\0" not in path
