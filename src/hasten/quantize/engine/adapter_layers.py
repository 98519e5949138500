"""What adapters change in a pipeline: the layers that a file speaks of, and those that can have adapters at all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn

from hasten.core.errors import HastenError, nearest
from hasten.core.target import Target
from hasten.formats.lora import AdapterFile, LayerPart, Names, Place, read_adapter
from hasten.kernels.modules import QuantizedLinear
from hasten.quantize.engine.ranks import Key, Layers, in_words, sizes

RANDOM = "random"
"""Stands for an adapter of small random numbers on all layers in blocks, to try and to time adapters with."""
RANDOM_RANK = 4


def adaptable(target: Target) -> dict[Key, nn.Module]:
    """The layers that can have adapters, by component and path. Layers inside PEFT's adapters go by the outer path."""
    found: dict[Key, nn.Module] = {}
    for component, network in target.modules.items():
        for path, layer in network.named_modules():
            outer = path.replace(".base_layer", "")
            if "lora_" not in path and not hasattr(layer, "lora_A") and sizes(layer) is not None:
                found[component, outer] = layer
    return found


def layers_of(adapter: str, target: Target) -> Layers:
    """What an adapter, a file (or "random"), adds to which layers of a target.

    Raises HastenError for what cannot be read, for layers that the target has not, and for other sizes.
    """
    known = adaptable(target)
    if adapter == RANDOM:
        return dict(_random(target, known))
    file = read_adapter(adapter)
    names = Names(_by_component(known), target.denoisers[0].name)
    found: dict[Key, LayerPart] = {}
    for name in file.layers:
        places = names.find(name)
        if not places:
            raise HastenError(_unknown(file, name, names, target, known))
        found |= _parts(file, name, places, known)
    return found


def with_siblings(keys: Iterable[Key], patterns: Iterable[str], known: Iterable[Key]) -> list[Key]:
    """Layers, the same layers of all other blocks (so that equal blocks stay equal), and those that match patterns."""
    kinds = {_kind(key) for key in keys}
    wanted = tuple(patterns)
    return [key for key in known if _kind(key) in kinds or any(fnmatchcase(".".join(key), one) for one in wanted)]


def _kind(key: Key) -> Key:
    return key[0], re.sub(r"\.\d+(?=\.|$)", ".*", key[1])


def _by_component(keys: Iterable[Key]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for component, path in keys:
        found.setdefault(component, []).append(path)
    return found


def _parts(
    file: AdapterFile, name: str, places: list[Place], known: dict[Key, nn.Module]
) -> Iterator[tuple[Key, LayerPart]]:
    """Cut the outputs of a stored layer into those of the layers it stands for."""
    stored, start = file.layers[name], 0
    shapes = [sizes(known[place.component, place.path]) or (0, 0) for place in places]
    total = sum(outputs for _, outputs in shapes)
    if total != stored.outputs or any(inputs != stored.inputs for inputs, _ in shapes):
        raise HastenError(
            f"{file.path}: {name} is made for {stored.inputs} inputs and {stored.outputs} outputs, and this model's "
            f"layer has {shapes[0][0]} and {total}; the adapter belongs to another model."
        )
    for place, (_, outputs) in zip(places, shapes, strict=True):
        rows = None if len(places) == 1 else slice(start, start + outputs)
        yield (place.component, place.path), file.part(name, rows, halves_swapped=place.halves_swapped)
        start += outputs


def _unknown(file: AdapterFile, name: str, names: Names, target: Target, known: Iterable[Key]) -> str:
    component = names.component(name)
    if component not in target.modules:
        return f"{file.path} has weights for a {component}, and {target.title} has none."
    paths = [path for part, path in known if part == component]
    return f"{file.path}: the {component} of {target.title} has no layer {name}. {nearest(name, paths)}"


def _random(target: Target, known: dict[Key, nn.Module]) -> Iterator[tuple[Key, LayerPart]]:
    denoisers = {denoiser.name for denoiser in target.denoisers}
    for (component, path), layer in known.items():
        if component in denoisers and isinstance(layer, nn.Linear | QuantizedLinear) and re.search(r"\.\d+\.", path):
            inputs, outputs = sizes(layer) or (0, 0)
            read = partial(_drawn, f"{component}.{path}", inputs, outputs)
            yield (component, path), LayerPart(RANDOM_RANK, inputs, outputs, 1.0, read)


def _drawn(name: str, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices whose product is about a hundredth of a usual weight, the same in every process."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(RANDOM_RANK, inputs, generator=generator) / inputs**0.5
    return down, torch.randn(outputs, RANDOM_RANK, generator=generator) * 0.02


__all__ = ["RANDOM", "adaptable", "in_words", "layers_of", "with_siblings"]
