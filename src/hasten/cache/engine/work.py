"""Counts the work of a denoiser call without doing it: on the meta device, with the specification's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from hasten.cache.engine.site import Site
from hasten.core.spec import InputSize
from hasten.core.target import Denoiser, Target
from hasten.core.workload import Workload

_UNKNOWN_PIXELS = 1024
_PIXELS_PER_LATENT = 8


def stand_in(denoiser: Denoiser) -> Denoiser:
    """A copy of the denoiser on the meta device: same shapes and type, no memory."""
    config = {key: value for key, value in _config(denoiser).items() if not key.startswith("_")}
    dtype = next(denoiser.module.parameters()).dtype
    module = denoiser.spec.build(config, device="meta")
    # Not the model's own `to`, which warns of weights that a run should keep in float32.
    return Denoiser(denoiser.name, nn.Module.to(module, dtype), denoiser.spec)


def example_call(denoiser: Denoiser, target: Target, workload: Workload) -> dict[str, Any]:
    """Arguments of one call for a workload, on the meta device.

    Without a size in the workload the released model's counts, then the configuration's, then 1024 pixels; one
    latent pixel stands for 8 x 8 pixels unless the pipeline says otherwise. Guidance in one batch doubles it.
    """
    spec, config = denoiser.spec, _config(denoiser)
    scale = int(getattr(target.pipeline, "vae_scale_factor", _PIXELS_PER_LATENT))
    released = spec.released.get(target.title)
    usual = config.get("sample_size")
    pixels = usual * scale if isinstance(usual, int) else _UNKNOWN_PIXELS
    size = InputSize(
        batch=workload.batch * (2 if spec.guidance == "batched" else 1),
        height=(workload.height or (released.height if released else pixels)) // scale,
        width=(workload.width or (released.width if released else pixels)) // scale,
        frames=released.frames if released else 1,
        text_tokens=workload.max_sequence_length or (released.text_tokens if released else 77),
    )
    dtype = next(denoiser.module.parameters()).dtype
    return tree_map(lambda value: _to_meta(value, dtype), spec.example(config, size))


def flops(denoiser: Denoiser, arguments: dict[str, Any], site: Site) -> int:
    """Multiply-adds (counted twice, as usual) of one call; matrix products, convolutions and attention count."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        site.run(denoiser.module, arguments, (), arguments)
    return counter.get_total_flops()


def _config(denoiser: Denoiser) -> dict[str, Any]:
    return dict(cast("Mapping[str, Any]", denoiser.module.config))


def _to_meta(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to("meta", dtype if value.is_floating_point() else value.dtype)
