"""Decodes large pictures in overlapping tiles, so that the VAE's activations stay small."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hasten.core.errors import InvalidSetting, NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload

LEAST = 4
OVERLAP = 0.25


@dataclass(frozen=True, kw_only=True)
class VaeTiling(Technique):
    """Has the VAE decode pictures larger than a tile piece by piece; the pieces overlap by a quarter and are blended.

    Peak memory of decoding then depends on the tile and no longer on the picture. The decoder's normalisation and
    its attention see one tile at a time, so colours can drift a little from tile to tile: the picture may change.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    lossy: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2112.10752"

    tile: int | None = field(
        default=None, metadata=about("side of a tile in pixels; by default the VAE's own, often 512", trial=4)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tile is not None and self.tile < LEAST:
            raise InvalidSetting(f"VaeTiling: tile is {self.tile} pixels and must be at least {LEAST}.")

    def claims(self) -> tuple[str, ...]:
        """How the VAE cuts pictures."""
        return ("vae.tiles",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a VAE that can decode in tiles."""
        if not hasattr(type(target.vae), "tiled_decode"):
            kind = type(target.vae).__name__ if target.vae is not None else None
            found = f"its {kind} cannot decode in tiles" if kind else "it has no VAE"
            yield f"{target.title}: {found}."

    def apply(self, target: Target, patch: Patch) -> None:
        """Set the VAE's own switches, and count what it decodes."""
        vae: Any = target.vae
        counts = patch.keep(_Counts())
        for name, value in {"use_tiling": True, **_sizes(vae, self.tile)}.items():
            patch.set(vae, name, value, "large pictures are decoded in tiles")
        patch.around(vae, counts.counting("pictures"), "decoded pictures are counted", method="decode")
        patch.around(vae, counts.counting("tiled"), "pictures decoded in tiles are counted", method="tiled_decode")

    def engaged(self, session: Session) -> Evidence:
        """At least one picture was larger than a tile."""
        counts = session.state(self, _Counts)
        if not counts.tiled:
            raise NotEngaged("no picture was larger than a tile." if counts.pictures else "nothing was decoded.")
        return Evidence(summary=f"{counts.tiled} of {counts.pictures} pictures or batches were decoded in tiles")

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Decoding holds the activations of one tile."""
        pixels = _tile_pixels(target.vae, self.tile)
        if pixels is None or workload.width is None or workload.height is None:
            return Cost()
        return Cost(activations={"vae": min(1.0, pixels / (workload.width * workload.height))})


class _Counts:
    """Calls of the VAE."""

    def __init__(self) -> None:
        self.pictures = self.tiled = 0

    def counting(self, name: str) -> Callable[..., Any]:
        def count(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return call(*args, **kwargs)

        return count


def _sizes(vae: Any, tile: int | None) -> dict[str, Any]:
    """The attributes of a VAE class that hold a tile's size, with their new values."""
    if tile is None:
        return {}
    if hasattr(vae, "tile_latent_min_size"):
        scale = vae.tile_sample_min_size / vae.tile_latent_min_size
        latent = max(2, round(tile / scale))
        return {"tile_sample_min_size": round(latent * scale), "tile_latent_min_size": latent}
    stride = round(tile * (1 - OVERLAP))
    sides = ("height", "width")
    return {f"tile_sample_min_{side}": tile for side in sides} | {
        f"tile_sample_stride_{side}": stride for side in sides
    }


def _tile_pixels(vae: Any, tile: int | None) -> int | None:
    side = tile or getattr(vae, "tile_sample_min_size", None) or getattr(vae, "tile_sample_min_height", None)
    return side * side if isinstance(side, int) else None
