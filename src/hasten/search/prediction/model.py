"""A pipeline without weights: read from configuration files, from what is known of a released model, or copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hasten.core.errors import HastenError, UnknownName
from hasten.core.files import read_json
from hasten.core.intercept import base_class
from hasten.core.spec import Released
from hasten.core.target import Denoiser, Target, find_released, released_models, spec_of
from hasten.core.workload import Workload
from hasten.models import bundled, default_workload, find_folder
from hasten.search.prediction.networks import build, configuration, find_class, meta_copy, weight_bytes

DENOISERS = ("transformer", "transformer_2", "unet", "prior")
"""Names of a pipeline's denoisers; of two, one runs at a time."""
_PIXELS_PER_LATENT = 8


class StandIn:
    """Takes the place of a pipeline whose parts have no weights."""

    def __init__(self, components: dict[str, Any], kind: type | None, scale: int) -> None:
        self.components, self.kind, self.vae_scale_factor = components, kind, scale
        self.scheduler = components.get("scheduler")


@dataclass(frozen=True)
class PlannedModel:
    """A model as the planner sees it: parts on the meta device, and how a picture is usually made with it."""

    name: str
    target: Target
    workload: Workload
    tokens: Mapping[str, int] = field(default_factory=dict[str, int])
    """Text tokens that an encoder is called with, where the text does not decide."""
    guided: bool = True
    """Is guidance usual? Distilled models go without."""
    guided_above: float = 1.0
    """Guidance scale above which a picture is denoised with and without its prompt."""
    frames: int = 1
    """Frames of a video, in pixels."""

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of each part's weights."""
        return {name: weight_bytes(module) for name, module in self.target.modules.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of the denoiser's weights; some are kept in float32."""
        counts: Counter[torch.dtype] = Counter()
        for weight in self.target.denoisers[0].module.parameters():
            counts[weight.dtype] += weight.numel()
        return counts.most_common(1)[0][0]

    @property
    def scale(self) -> int:
        """Pixels per latent pixel, along one side."""
        return int(cast(Any, self.target.pipeline).vae_scale_factor)

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(name for name in self.target.modules if name.startswith("text_encoder"))


def planned_model(name: str, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> PlannedModel:
    """Describe a released model (`FLUX.1-dev`, also as `owner/FLUX.1-dev`), a bundled one, or a folder.

    Of a folder only model_index.json and the configuration files are read. On another device than "meta" the parts
    of a released model have random weights, to measure what was predicted. Raises UnknownName with neighbours.
    """
    short = name.rpartition("/")[2] if not Path(name).is_dir() else name
    if short.casefold() in {model.casefold() for model in released_models()} and short not in bundled():
        return _released(short, dtype, device)
    try:
        folder = find_folder(name)
    except UnknownName:
        folder = None
    if folder is None:
        raise UnknownName("model that can be planned without a download", name, [*bundled(), *released_models()])
    return _from_folder(name, folder, dtype)


def planned_from(pipeline: Any, name: str = "", workload: Workload | None = None) -> PlannedModel:
    """Describe a live pipeline: its parts as they are now, copied to the meta device without their values."""
    live = Target.of(pipeline)
    parts: dict[str, Any] = {part: meta_copy(module) for part, module in live.modules.items()}
    return _assembled(name or live.title, parts | {"scheduler": live.scheduler}, base_class(pipeline), workload)


def _from_folder(name: str, folder: Path, dtype: torch.dtype) -> PlannedModel:
    index = cast("dict[str, Any]", read_json(folder / "model_index.json"))
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if _names_a_network(entry) and (file := folder / part / "config.json").is_file():
            config = cast("dict[str, Any]", read_json(file))
            if "quantization_config" in config:
                raise HastenError(f"{file.parent} holds quantized weights; plan for the model that they were made of.")
            parts[part] = build(entry[0], entry[1], config, dtype)
    if "scheduler" in index:
        library, cls = cast("list[str]", index["scheduler"])
        parts["scheduler"] = find_class(library, cls).from_pretrained(folder / "scheduler")
    kind = find_class("diffusers", str(index["_class_name"]))
    return _assembled(name, parts, kind, default_workload(folder))


def _names_a_network(entry: object) -> bool:
    pair = cast("list[object]", entry)
    return isinstance(entry, list) and len(pair) == 2 and all(isinstance(item, str) for item in pair)


def _released(name: str, dtype: torch.dtype, device: str) -> PlannedModel:
    spec, released = find_released(name)
    name = next(model for model in spec.released if model.casefold() == name.casefold())
    known = _components()["models"].get(name)
    if known is None:
        raise UnknownName("released model whose text encoders and VAE are known", name, _components()["models"])
    first = "unet" if spec.unet else "transformer"
    parts = {part: _network(network, dtype, device) for part, network in known["parts"].items()}
    for part in (first, f"{first}_2")[: known.get("denoisers", 1)]:
        parts[part] = build("diffusers", spec.model_class, released.config, dtype, device)
    parts["scheduler"] = find_class("diffusers", known["scheduler"])()
    return _assembled(
        name, parts, find_class("diffusers", released.pipeline), _usual(released),
        tokens=known.get("tokens", {}), guided=known.get("guided", True), frames=released.frames,
        guided_above=known.get("guided_above", 1.0),
    )  # fmt: skip


def _usual(released: Released) -> Workload:
    return Workload(width=released.width, height=released.height, steps=released.steps)


def _network(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    entry = _components()["networks"][name]
    return build(entry["library"], entry["class"], entry["config"], dtype, device)


def _components() -> dict[str, Any]:
    return cast("dict[str, Any]", read_json(Path(str(resources.files("hasten"))) / "data" / "components.json"))


def _assembled(
    name: str, parts: dict[str, Any], kind: type | None, workload: Workload | None, **facts: Any
) -> PlannedModel:
    names = [part for part in DENOISERS if isinstance(parts.get(part), nn.Module)]
    if not names:
        raise HastenError(f"{name} has no denoiser (transformer or unet) that could be planned.")
    stand_in = StandIn(parts, kind, _scale(parts.get("vae")))
    target = Target(stand_in, tuple(Denoiser(part, parts[part], spec_of(parts[part])) for part in names), name)
    return PlannedModel(name, target, workload or Workload(), **facts)


def _scale(vae: nn.Module | None) -> int:
    """Pixels per latent pixel: a halving between each two levels of the VAE, where it does not say."""
    config = configuration(vae) if vae is not None else {}
    if "scale_factor_spatial" in config:
        return int(config["scale_factor_spatial"])
    levels = cast("tuple[int, ...]", config.get("block_out_channels", ()))
    return 2 ** (len(levels) - 1) if levels else _PIXELS_PER_LATENT
