"""Saves pipelines and networks with quantized layers so that they load again, weight by weight the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hasten.core.errors import HastenError, nearest
from hasten.core.files import atomic_write_text, json_text, new_folder, read_json
from hasten.core.intercept import base_class
from hasten.formats.components import empty, entries, stored_names
from hasten.formats.opening import format_named
from hasten.kernels.modules import Quantized, QuantizedConv2d, QuantizedLinear

RECORD = "hasten.json"
"""In a folder that hasten saved: its version and the type of each component."""
METHOD = "hasten"
"""What `quantization_config` names in the configuration of a component whose weights are in hasten's layout."""
VERSION = 1
_WEIGHTS = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}


def save(subject: object, folder: str | Path) -> Path:
    """Save a diffusers pipeline, or one network, with its quantized layers; `hasten.load` gives back the same.

    The folder is one of diffusers: components without quantized layers are saved as diffusers does, the others in
    hasten's layout. It appears when all has been written; one that hasten or diffusers made is replaced. Raises
    HastenError for a folder that holds something else, and for networks that were changed in other ways.
    """
    target = Path(folder).expanduser()
    _check_target(target)
    with new_folder(target) as temporary:
        if isinstance(subject, nn.Module):
            _save_network(subject, temporary, base_class(subject).__name__)
        else:
            _save_pipeline(subject, temporary)
    return target


def is_quantized(network: object) -> bool:
    """Has it layers with weights in codes?"""
    return isinstance(network, nn.Module) and any(isinstance(layer, Quantized) for layer in network.modules())


def _check_target(target: Path) -> None:
    if target.is_file():
        raise HastenError(f"Cannot save into {target}: a file of that name is there.")
    made = ("model_index.json", "config.json", RECORD)
    if target.is_dir() and any(target.iterdir()) and not any((target / name).is_file() for name in made):
        raise HastenError(f"Cannot save into {target}: the folder holds files that are no model.")


def _save_pipeline(pipeline: Any, folder: Path) -> None:
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict) or not callable(getattr(pipeline, "save_config", None)):
        raise HastenError(f"hasten saves a diffusers pipeline or a network, not {type(pipeline).__name__}.")
    found = cast("dict[str, Any]", components)
    for name, part in found.items():
        if is_quantized(part):
            _save_network(part, folder / name, name)
        elif part is not None and hasattr(part, "save_pretrained"):
            part.save_pretrained(str(folder / name))
    pipeline.save_config(str(folder))
    _note_labels(pipeline, folder / "model_index.json")
    dtypes = {name: _dtype(part) for name, part in found.items() if isinstance(part, nn.Module)}
    atomic_write_text(folder / RECORD, json_text({"version": VERSION, "dtypes": dtypes}))
    workload = Path(str(getattr(pipeline, "name_or_path", None) or "")) / "workload.json"
    if workload.is_file():
        shutil.copy(workload, folder)


def _note_labels(pipeline: Any, index: Path) -> None:
    """The names of classes, which diffusers reads from the index of a pipeline and does not write into it."""
    labels = getattr(pipeline, "labels", None)
    if not isinstance(labels, dict) or not labels:
        return
    names: dict[str, list[str]] = {}
    for name, number in cast("dict[str, int]", labels).items():
        names.setdefault(str(number), []).append(name)
    data = cast("dict[str, Any]", read_json(index))
    data["id2label"] = {number: ", ".join(found) for number, found in names.items()}
    atomic_write_text(index, json_text(data))


def _dtype(network: nn.Module) -> str:
    tensor = next((one for one in network.parameters() if one.is_floating_point()), torch.empty(0))
    return str(tensor.dtype).removeprefix("torch.")


def _save_network(network: nn.Module, folder: Path, name: str) -> None:
    _check_layers(network, name)
    _save_config(network, folder)
    _check_names(network, name)
    library = "transformers" if type(network).__module__.startswith("transformers.") else "diffusers"
    given = dict(entries(network))
    writer = format_named("hasten").create(folder / _WEIGHTS[library], list(given), {"format": "pt"})
    try:
        for key, entry in given.items():
            writer.add(key, entry)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _save_config(network: nn.Module, folder: Path) -> None:
    """The configuration as the library writes it, with a note that other readers do not overlook."""
    config = getattr(network, "config", None)
    owner = config if hasattr(config, "save_pretrained") else network
    method = getattr(owner, "save_pretrained" if owner is config else "save_config", None)
    if method is None:
        raise HastenError(f"{base_class(network).__name__} has no configuration that it could be built from again.")
    folder.mkdir(parents=True, exist_ok=True)
    method(str(folder))
    file = folder / "config.json"
    data = cast("dict[str, Any]", read_json(file))
    data["quantization_config"] = {"quant_method": METHOD, "version": VERSION, "dtype": _dtype(network)}
    atomic_write_text(file, json_text(data))


def _check_layers(network: nn.Module, name: str) -> None:
    for path, layer in network.named_modules():
        if isinstance(layer, Quantized) and base_class(layer) not in (QuantizedLinear, QuantizedConv2d):
            raise HastenError(f"{name}.{path} is a {base_class(layer).__name__}, which hasten cannot save.")


def _check_names(network: nn.Module, name: str) -> None:
    """Would a network built from the configuration have places for just these weights?"""
    wanted = stored_names(_as_configured(network))
    given = [key for key, _ in entries(network)]
    if extra := sorted(set(given) - set(wanted)):
        raise HastenError(
            f"The {name} has been changed in a way that cannot be saved: it has {extra[0]!r}, which a network of its "
            f"configuration does not have. {nearest(extra[0], wanted)} Take off adapters and other techniques first."
        )
    if missing := sorted(set(wanted) - set(given)):
        raise HastenError(f"The {name} has been changed in a way that cannot be saved: it has no {missing[0]!r}.")


def _as_configured(network: Any) -> nn.Module:
    kind: Any = base_class(network)
    config = network.config
    if hasattr(kind, "from_config"):
        return empty(lambda: kind.from_config(config))
    return empty(lambda: kind(config))
