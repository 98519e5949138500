"""Finds the layers of a pipeline that the entries of an adapter file are meant for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hasten.formats.lora.original_names import FAMILIES

DENOISER = ("model.diffusion_model.", "diffusion_model.", "lora_unet_", "lora_transformer_", "transformer.", "unet.")
"""What files write in front of the names of the denoiser's layers."""
ENCODERS = {
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),
}
"""The same for kohya's text encoders, with the components that it may stand for."""
WRAPPERS = ("base_model.model.",)
"""What PEFT writes in front of all names."""


@dataclass(frozen=True)
class Place:
    """A layer of a component, and which of the outputs that a file gives for it are its own."""

    component: str
    path: str
    part: int = 0
    halves_swapped: bool = False


class Names:
    """All names by which files may call the layers of a pipeline.

    Args:
        layers: for each component the paths of its layers, in diffusers' names.
        denoiser: the component that names without a prefix belong to.
    """

    def __init__(self, layers: Mapping[str, Iterable[str]], denoiser: str) -> None:
        self._components = list(layers)
        self._denoiser = denoiser
        self._known = {name: _index(name, list(paths)) for name, paths in layers.items()}

    def find(self, name: str) -> list[Place]:
        """The layers that an entry stands for, in the order of its outputs; none for an unknown name."""
        component, rest = self._split(name)
        found = self._known.get(component, {})
        return found.get(rest) or found.get(rest.removeprefix("text_model.").removeprefix("text_model_")) or []

    def component(self, name: str) -> str:
        """The component that a name speaks of, whether or not it is there."""
        return self._split(name)[0]

    def _split(self, name: str) -> tuple[str, str]:
        for wrapper in WRAPPERS:
            name = name.removeprefix(wrapper)
        first, _, rest = name.partition(".")
        if rest and (first in self._components or first.startswith("text_encoder")):
            return first, rest
        for prefix, components in ENCODERS.items():
            if name.startswith(prefix):
                present = [item for item in components if item in self._components]
                return (present or components)[0], name.removeprefix(prefix)
        for prefix in DENOISER:
            if name.startswith(prefix):
                return self._denoiser, name.removeprefix(prefix)
        return self._denoiser, name


def _index(component: str, paths: list[str]) -> dict[str, list[Place]]:
    """Places by name: diffusers' and original ones, with dots and, as kohya writes them, with underscores."""
    found: dict[str, list[Place]] = {}
    for family in FAMILIES:
        for path, original in family(paths):
            places = found.setdefault(original.name, [])
            places.append(Place(component, path, original.part, original.halves_swapped))
    for path in paths:
        found[path] = [Place(component, path)]
    flat = {name.replace(".", "_"): places for name, places in found.items()}
    return {name: sorted(places, key=lambda place: place.part) for name, places in (flat | found).items()}
