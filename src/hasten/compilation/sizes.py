"""Declared picture sizes: each has compiled code of its own, all others share code for any size."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from hasten.core.errors import HastenError, InvalidSetting
from hasten.core.spec import InputSize
from hasten.core.target import Denoiser, Target

ANY = "other sizes"
"""Names the code for sizes that were not declared."""

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of a size such as "1024x768"; raises InvalidSetting."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InvalidSetting(f"buckets: {text!r} is no size; write width x height in pixels, such as '1024x768'.")
    width, height = int(match[1]), int(match[2])
    if width % 8 or height % 8:
        raise InvalidSetting(f"buckets: {text} - width and height must be multiples of 8.")
    return width, height


def pixels_per_latent(target: Target) -> int:
    """How many pixels a row of latents stands for: what the pipeline or the VAE says, otherwise 8."""
    for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
        if isinstance(value := getattr(target.pipeline, name, None), int):
            return value
    channels = getattr(getattr(target.vae, "config", None), "block_out_channels", None)
    return 2 ** (len(channels) - 1) if channels else 8


def input_size(size: str, target: Target, batch: int = 1) -> InputSize:
    """The size of a denoiser call for a picture of this size."""
    width, height = parse_size(size)
    scale = pixels_per_latent(target)
    return InputSize(batch=batch, height=height // scale, width=width // scale)


class Sizes:
    """Which of the declared sizes the present call has. Told by shapes alone, so nothing waits for a GPU."""

    def __init__(self, buckets: tuple[str, ...], target: Target) -> None:
        self.present = ANY
        self.calls: dict[str, int] = {}
        self._buckets, self._target = buckets, target

    def watching(self, denoiser: Denoiser) -> Callable[..., Any]:
        """A link around a denoiser's call that notes its size."""
        spec, shapes = denoiser.spec, dict(self._shapes_of(denoiser))
        position = _position(denoiser)

        def watch(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            latents = kwargs[spec.latents] if spec.latents in kwargs else args[position]
            self.present = shapes.get(extent(latents), ANY)
            self.calls[self.present] = self.calls.get(self.present, 0) + 1
            return call(*args, **kwargs)

        return watch

    def of_latents(self, latents: object) -> str:
        """The declared size of a VAE decoder's input."""
        found = extent(latents)
        sizes = {size: input_size(size, self._target) for size in self._buckets}
        return next((name for name, size in sizes.items() if (size.height, size.width) == found), ANY)

    def _shapes_of(self, denoiser: Denoiser) -> Iterator[tuple[tuple[int, ...], str]]:
        config = cast("dict[str, Any]", dict(getattr(denoiser.module, "config", {})))
        for size in self._buckets:
            given = denoiser.spec.example(config, input_size(size, self._target))
            yield extent(given[denoiser.spec.latents]), size


def check_buckets(buckets: tuple[str, ...], denoiser: Denoiser, target: Target) -> Iterator[str]:
    """Say which declared sizes this denoiser cannot have."""
    config = cast("dict[str, Any]", dict(getattr(denoiser.module, "config", {})))
    for size in buckets:
        try:
            given = denoiser.spec.example(config, input_size(size, target))
            if 0 in extent(given[denoiser.spec.latents]):
                yield f"{denoiser.spec.model_class} has nothing to compute at the size {size}; declare a larger one."
        except NotImplementedError:
            yield f"sizes cannot be declared for {denoiser.spec.model_class}, whose inputs hasten does not know."
            return
        except (HastenError, RuntimeError, ValueError) as error:
            yield f"{denoiser.spec.model_class} cannot be given the size {size}: {' '.join(str(error).split())}."


def extent(latents: object) -> tuple[int, ...]:
    """Rows and columns of latents, or the number of tokens where they are packed to [batch, tokens, channels]."""
    if isinstance(latents, list | tuple):
        latents = cast("list[object]", latents)[0]
    if not isinstance(latents, torch.Tensor):
        return ()
    return (latents.shape[1],) if latents.dim() == 3 else tuple(latents.shape[-2:])


def _position(denoiser: Denoiser) -> int:
    import inspect

    return list(inspect.signature(denoiser.module.forward).parameters).index(denoiser.spec.latents)
