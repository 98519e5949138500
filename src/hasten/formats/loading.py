"""Loads models with quantized weights: folders that hasten saved, and single files put into a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hasten.core.errors import HastenError, UnknownName
from hasten.core.files import read_json
from hasten.core.registry import specs
from hasten.formats.components import empty, fill
from hasten.formats.format import Reader
from hasten.formats.keys import in_scheme, recognized
from hasten.formats.opening import open_file
from hasten.formats.saving import METHOD, RECORD, VERSION
from hasten.kernels.modules import Quantized
from hasten.models import LoadedModel, bundled, device_for, dtype_for, dtype_named, find_folder
from hasten.models import load as load_pipeline

_CLASSES = {
    "t5": ("T5EncoderModel", "UMT5EncoderModel"),
    "clip": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "open_clip": ("CLIPTextModelWithProjection", "CLIPTextModel"),
    "vae": ("AutoencoderKL",),
}
"""Of the architectures that are no denoisers."""


def load(
    name: str | Path,
    *,
    base: str | Path | None = None,
    component: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> LoadedModel:
    """Load a pipeline: a bundled name, a local folder, a hub id - or a file of weights with the pipeline it goes into.

    Args:
        name: of the model; or a file (or folder of shards) with the weights of one network in any format that hasten
            reads, which keeps them in codes: `load("flux-Q4_K.gguf", base="FLUX.1-dev")`.
        base: for a file, the pipeline whose network of the same kind it replaces: a bundled name, folder or hub id.
        component: name of that network, where there are several of its kind.
        device: by default a GPU if there is one.
        dtype: name of a torch type; by default that of the folder hasten saved, else float32 on the CPU and bfloat16
            on a GPU. Codes and scales keep theirs.

    Raises HastenError for unknown names, damaged files, and weights that do not fit the network.
    """
    name = str(name)
    path = Path(name).expanduser()
    if name in bundled() or not _is_weights(path):
        if base is not None:
            raise HastenError(f"base= is for a file with the weights of one network, and {name} is none.")
        return _load_folder(name, device, dtype)
    if base is None:
        raise HastenError(f"{name} holds the weights of one network; say base=, the pipeline that it belongs to.")
    return _load_into(path, str(base), component, device, dtype)


def _is_weights(path: Path) -> bool:
    if path.is_dir():
        return not (path / "model_index.json").is_file() and any(path.glob("*.safetensors"))
    return path.is_file()


def _load_folder(name: str, device: str | None, dtype: str | None) -> LoadedModel:
    folder = find_folder(name)
    parts = _quantized_parts(folder) if folder else {}
    if folder is None or not parts:
        return load_pipeline(name, device=device, dtype=dtype)
    index = cast("dict[str, Any]", read_json(folder / "model_index.json"))
    made = {key: _saved_network(folder / key, _class_of(index, key), dtype) for key in parts}
    return load_pipeline(name, device=device, dtype=dtype, components=made, dtypes=_dtypes(folder))


def _quantized_parts(folder: Path) -> dict[str, Path]:
    return {file.parent.name: file for file in sorted(folder.glob("*/config.json")) if _is_ours(file)}


def _is_ours(config: Path) -> bool:
    found = read_json(config)
    note = cast("dict[str, Any]", found).get("quantization_config") if isinstance(found, dict) else None
    if not isinstance(note, dict) or cast("dict[str, Any]", note).get("quant_method") != METHOD:
        return False
    if (version := cast("dict[str, Any]", note).get("version")) != VERSION:
        raise HastenError(f"{config} was written in version {version!r}; this version of hasten reads {VERSION}.")
    return True


def _dtypes(folder: Path) -> dict[str, str]:
    """Types of the components as they were saved; "default" for those without weights."""
    found = read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    dtypes = cast("dict[str, Any]", found).get("dtypes") if isinstance(found, dict) else None
    if not isinstance(dtypes, dict) or not all(isinstance(value, str) for value in cast("Any", dtypes).values()):
        return {}
    return cast("dict[str, str]", dtypes)


def _saved_network(folder: Path, kind: Any, dtype: str | None) -> nn.Module:
    model = _build(kind, _config(folder))
    with open_file(_weights_in(folder)).reader as reader:
        _filled(model, reader, None if dtype is None else dtype_named(dtype), folder)
    saved = dtype_named(dtype or _saved_dtype(folder))
    for layer in model.modules():
        if isinstance(layer, Quantized):
            layer.dtype = saved if layer.bias is None else layer.bias.dtype
    return model


def _saved_dtype(folder: Path) -> str:
    note = cast("dict[str, Any]", read_json(folder / "config.json"))["quantization_config"]
    return str(note.get("dtype"))


def _weights_in(folder: Path) -> Path:
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise HastenError(f"{folder} has to hold one file *.safetensors, and holds {len(found)}.")
    return found[0]


def _load_into(path: Path, base: str, component: str | None, device: str | None, dtype: str | None) -> LoadedModel:
    where = device_for(device)
    torch_dtype = dtype_named(dtype_for(where, dtype))
    with open_file(path).reader as reader:
        place = _place(reader, base, component)
        ours = in_scheme(reader, "diffusers", place.architecture)
        model = _build(place.kind, _base_config(base, place, ours))
        model = _filled(model, ours, torch_dtype, path)
    return load_pipeline(base, device=where, dtype=dtype, components={place.component: model})


@dataclass(frozen=True)
class _Place:
    """Where a file's weights belong in a pipeline."""

    architecture: str
    component: str
    kind: Any


def _place(reader: Reader, base: str, component: str | None) -> _Place:
    index = _index(base)
    architecture = recognized(reader.names()).naming.architecture
    classes = _CLASSES.get(architecture) or (specs()[architecture].model_class,)
    suiting = [name for kind in classes for name in index if _class_name(index, name) == kind]
    if component is not None and component not in index:
        raise UnknownName(f"component of {base}", component, [name for name in index if not name.startswith("_")])
    if component is None and not suiting:
        raise HastenError(f"The file holds weights of {architecture}, and {base} has no {' or '.join(classes)}.")
    if component is None and len(suiting) > 1 and architecture not in _CLASSES:
        raise HastenError(f"{base} has several networks of this kind: say component=, one of {', '.join(suiting)}.")
    name = component or suiting[0]
    return _Place(architecture, name, _class_of(index, name))


def _index(base: str) -> Mapping[str, Any]:
    folder = find_folder(base)
    if folder is not None:
        return cast("dict[str, Any]", read_json(folder / "model_index.json"))
    import diffusers

    try:
        return cast("dict[str, Any]", diffusers.DiffusionPipeline.load_config(base))
    except Exception as error:
        raise HastenError(f"Cannot load the configuration of {base!r} from the model hub: {error}") from error


def _class_name(index: Mapping[str, Any], component: str) -> str | None:
    entry = index[component]
    return cast("str | None", entry[1]) if isinstance(entry, list) and len(cast("list[Any]", entry)) == 2 else None


def _class_of(index: Mapping[str, Any], component: str) -> Any:
    import diffusers
    import transformers

    name = _class_name(index, component) or ""
    found = getattr(diffusers, name, None) or getattr(transformers, name, None)
    if found is None:
        raise HastenError(f"The pipeline's {component} is of class {name or None}, which diffusers does not have.")
    return found


def _base_config(base: str, place: _Place, reader: Reader) -> Mapping[str, Any]:
    """From the base's folder; of a denoiser whose folder is not there, the released one that fits the weights."""
    folder = find_folder(base)
    if folder is not None and (folder / place.component / "config.json").is_file():
        return _config(folder / place.component)
    if folder is None:
        return cast("dict[str, Any]", place.kind.load_config(base, subfolder=place.component))
    return _released(place, reader)


def _released(place: _Place, reader: Reader) -> Mapping[str, Any]:
    shapes = {name: reader.shape(name) for name in reader.names()}
    released = specs()[place.architecture].released if place.architecture in specs() else {}
    for entry in released.values():
        model = _build(place.kind, entry.config)
        if {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes:
            return entry.config
    raise HastenError(
        f"The base has no {place.component}/config.json, and the weights are those of no released model that is known"
        f" ({', '.join(released) or 'none'})."
    )


def _config(folder: Path) -> Mapping[str, Any]:
    data = read_json(folder / "config.json")
    if not isinstance(data, dict):
        raise HastenError(f"{folder / 'config.json'} holds no configuration.")
    return {key: value for key, value in cast("dict[str, Any]", data).items() if key != "quantization_config"}


def _build(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """An empty network of a class of diffusers or transformers."""
    if hasattr(kind, "load_config"):
        return empty(lambda: kind.from_config(dict(config)))
    settings = kind.config_class.from_dict(json.loads(json.dumps(dict(config))))
    return empty(lambda: kind(settings))


def _filled(model: nn.Module, reader: Reader, dtype: torch.dtype | None, path: Path) -> nn.Module:
    try:
        fill(model, reader, dtype)
    except HastenError as error:
        raise HastenError(f"{path}: {error}") from error
    return model
