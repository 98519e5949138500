"""Calls a diffusers pipeline for one picture, with the arguments that this pipeline understands."""

from __future__ import annotations

import inspect
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from hasten.core.errors import BrokenOutput, HastenError, UnknownName
from hasten.core.workload import Workload


def render(pipeline: Any, workload: Workload, prompt: str, seed: int) -> Image.Image:
    """Make one picture. The seed's noise is drawn on the CPU, so that devices agree.

    Of a video the middle frame is returned. Raises BrokenOutput for NaN, HastenError for settings that this
    pipeline does not take.
    """
    output = pipeline(**arguments(pipeline, workload, prompt, seed))
    frames = getattr(output, "frames", None)
    pixels = np.asarray(output.images if frames is None else frames)[0]
    if pixels.ndim == 4:
        pixels = pixels[len(pixels) // 2]
    if not np.isfinite(pixels).all():
        raise BrokenOutput(f"The picture for {prompt!r} (seed {seed}) contains NaN or infinite values.")
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def arguments(pipeline: Any, workload: Workload, prompt: str, seed: int) -> dict[str, Any]:
    """The call's arguments: what the workload says, under the names that the pipeline uses."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    values = _subject(pipeline, accepted, prompt) | _settings(pipeline, accepted, workload)
    values["num_inference_steps"] = workload.steps
    values["generator"] = torch.Generator("cpu").manual_seed(seed)
    values["output_type"] = "np"
    return values


def _subject(pipeline: Any, accepted: Any, prompt: str) -> dict[str, Any]:
    if "class_labels" in accepted:
        return {"class_labels": [class_id(pipeline, prompt)]}
    if "prompt" in accepted:
        return {"prompt": prompt}
    raise HastenError(f"{type(pipeline).__name__} takes neither a prompt nor a class; it cannot be compared.")


def _settings(pipeline: Any, accepted: Any, workload: Workload) -> dict[str, Any]:
    wanted = {
        "width": workload.width,
        "height": workload.height,
        "guidance_scale": workload.guidance,
        "max_sequence_length": workload.max_sequence_length,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    size = {"width", "height"} & set(given)
    if size - set(accepted):
        _check_fixed_size(pipeline, workload)
    return {name: value for name, value in given.items() if name in accepted}


def _check_fixed_size(pipeline: Any, workload: Workload) -> None:
    fixed = native_size(pipeline)
    if (workload.width, workload.height) not in {(fixed, fixed), (None, None)}:
        raise HastenError(f"{type(pipeline).__name__} makes pictures of {fixed}x{fixed} only.")


def native_size(pipeline: Any) -> int:
    """Side of the picture in pixels that the denoiser was made for: latent size times the VAE's factor."""
    denoiser: Any = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    sample = getattr(denoiser.config, "sample_size", None) or getattr(pipeline, "default_sample_size", 64)
    vae: Any = getattr(pipeline, "vae", None)
    blocks = cast("tuple[int, ...]", getattr(getattr(vae, "config", None), "block_out_channels", (0,) * 4))
    return int(sample) * 2 ** (len(blocks) - 1)


def class_id(pipeline: Any, name: str) -> int:
    """The number of a class given by one of its names; an unknown name suggests neighbours."""
    labels = cast("dict[str, int]", getattr(pipeline, "labels", {}))
    folded = {label.casefold(): number for label, number in labels.items()}
    if name.strip().casefold() in folded:
        return folded[name.strip().casefold()]
    raise UnknownName("class of this model", name, labels)
