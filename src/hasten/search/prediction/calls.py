"""One call of each part of a pipeline, with arguments of the right shapes, on the meta device or a real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map

from hasten.core.spec import InputSize
from hasten.core.target import Denoiser
from hasten.core.workload import Workload
from hasten.search.prediction.model import PlannedModel
from hasten.search.prediction.networks import configuration, meta_copy

_UNKNOWN_PIXELS = 1024
_TOKENS = 512
"""Text tokens where neither model nor workload says."""


@dataclass(frozen=True)
class Call:
    """A call that can be traced: what runs, and how often for a picture (per step for the denoiser)."""

    part: str
    module: nn.Module
    run: Callable[[], Any]
    times: int = 1


def calls(model: PlannedModel, workload: Workload) -> list[Call]:
    """The calls that make one picture: each text encoder, the denoiser's for one step, the VAE's decoding.

    Guidance doubles the denoiser's batch or its calls, as its specification says, and the calls of text encoders.
    """
    found = [_encoding(model, workload, name) for name in model.encoders]
    found.append(_denoising(model, workload, model.target.denoisers[0]))
    if model.target.vae is not None and hasattr(model.target.vae, "decode"):
        found.append(_decoding(model, workload, model.target.vae))
    return found


def guided(model: PlannedModel, workload: Workload) -> bool:
    """Is each picture denoised with and without its prompt?"""
    kind = model.target.denoisers[0].spec.guidance
    if kind not in ("batched", "separate"):
        return False
    return model.guided if workload.guidance is None else workload.guidance > model.guided_above


def size(model: PlannedModel, workload: Workload) -> tuple[int, int]:
    """Width and height in pixels: the workload's, else the model's usual ones."""
    usual = configuration(model.target.denoisers[0].module).get("sample_size")
    pixels = usual * model.scale if isinstance(usual, int) else _UNKNOWN_PIXELS
    return (
        workload.width or model.workload.width or pixels,
        workload.height or model.workload.height or pixels,
    )


def _denoising(model: PlannedModel, workload: Workload, denoiser: Denoiser) -> Call:
    twice = 2 if guided(model, workload) else 1
    batched = twice if denoiser.spec.guidance == "batched" else 1
    width, height = size(model, workload)
    given = denoiser.spec.example(
        configuration(denoiser.module),
        InputSize(
            batch=workload.batch * batched,
            height=height // model.scale,
            width=width // model.scale,
            frames=_latent_frames(model),
            text_tokens=_text_tokens(model, workload, denoiser),
        ),
    )
    arguments: dict[str, Any] = tree_map(lambda value: _moved(value, model.target.device, model.dtype), given)
    return Call(denoiser.name, denoiser.module, lambda: denoiser.module(**arguments), twice // batched)


def _text_tokens(model: PlannedModel, workload: Workload, denoiser: Denoiser) -> int:
    released = denoiser.spec.released.get(model.name)
    asked = workload.max_sequence_length or model.workload.max_sequence_length
    return asked or (released.text_tokens if released else 77)


def _latent_frames(model: PlannedModel) -> int:
    factor = configuration(model.target.vae).get("scale_factor_temporal", 1) if model.target.vae is not None else 1
    return (model.frames - 1) // int(factor) + 1


def _encoding(model: PlannedModel, workload: Workload, name: str) -> Call:
    module = model.target.modules[name]
    ids = torch.zeros(
        workload.batch, _encoder_tokens(model, workload, name), dtype=torch.long, device=model.target.device
    )
    return Call(name, module, lambda: module(ids), 2 if guided(model, workload) else 1)


def _encoder_tokens(model: PlannedModel, workload: Workload, name: str) -> int:
    config = configuration(model.target.modules[name])
    if name in model.tokens:
        return workload.max_sequence_length or model.tokens[name]
    if "clip" in str(config.get("model_type", "")):
        return int(config["max_position_embeddings"])
    return workload.max_sequence_length or model.workload.max_sequence_length or _TOKENS


def _decoding(model: PlannedModel, workload: Workload, vae: nn.Module) -> Call:
    config = configuration(vae)
    channels = int(config.get("latent_channels") or config.get("z_dim") or 4)
    width, height = size(model, workload)
    shape = (workload.batch, channels, height // model.scale, width // model.scale)
    if "z_dim" in config:  # a VAE of videos
        shape = (*shape[:2], _latent_frames(model), *shape[2:])
    if upcasts(model):
        vae = nn.Module.to(meta_copy(vae) if model.target.device.type == "meta" else vae, torch.float32)
    latents = torch.zeros(shape, dtype=next(vae.parameters()).dtype, device=model.target.device)
    return Call("vae", vae, lambda: cast(Any, vae).decode(latents, return_dict=False))


def upcasts(model: PlannedModel) -> bool:
    """Does the pipeline decode in float32, because the VAE overflows in float16?"""
    vae, kind = model.target.vae, cast(Any, model.target.pipeline).kind
    if vae is None or configuration(vae).get("force_upcast") is not True:
        return False
    return hasattr(kind, "upcast_vae") and next(vae.parameters()).dtype == torch.float16


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)
