"""Room for adapters: ranks kept free in the side branches of layers, and what is written into them.

Loading, weighting, exchanging and unloading an adapter are writes into tensors that compiled code and recorded CUDA
graphs read anyway, so that nothing is quantized, compiled or recorded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn

from hasten.core.errors import HastenError, UnknownName
from hasten.core.patch import Patch
from hasten.formats.lora import LayerPart
from hasten.kernels.adapted import AdaptedConv2d, AdaptedLinear, adapted
from hasten.kernels.modules import LowRank, Quantized

Key = tuple[str, str]
"""A component and the path of a layer in it."""
Layers = Mapping[Key, LayerPart]
"""What an adapter adds to each layer."""


@dataclass(frozen=True, eq=False)
class Room:
    """The ranks of one layer that adapters are written to; those in front of them are the layer's own (SVDQuant)."""

    parent: nn.Module
    name: str
    module: Quantized | AdaptedLinear | AdaptedConv2d
    first: int

    @property
    def in_place(self) -> bool:
        """Is the side branch still part of the model?"""
        present = self.parent._modules.get(self.name)
        while present is not None and present is not self.module:
            present = present._modules.get("base_layer")
        return present is self.module and self.module.rank_scale is not None

    @torch.no_grad()
    def write(self, slots: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float) -> None:
        """Put the matrices of an adapter into some ranks; it may have fewer than there are slots."""
        module, places = self.module, slots[: len(down)] + self.first
        assert module.down is not None
        assert module.up is not None
        module.down[places] = down.to(module.down)
        module.up[:, places] = up.to(module.up)
        self.weigh(slots, scale)

    @torch.no_grad()
    def weigh(self, slots: torch.Tensor, scale: float) -> None:
        """Set the factor of some ranks."""
        assert self.module.rank_scale is not None
        self.module.rank_scale[slots + self.first] = scale

    @torch.no_grad()
    def clear(self, slots: torch.Tensor) -> None:
        """Make ranks free again."""
        module, places = self.module, slots + self.first
        assert module.down is not None
        assert module.up is not None
        module.down[places] = 0
        module.up[:, places] = 0
        self.weigh(slots, 0.0)


def make_room(parent: nn.Module, name: str, ranks: int, dtype: torch.dtype, patch: Patch) -> Room:
    """Give a layer of any kind free ranks; one that is quantized keeps its place and gets a wider side branch."""
    while "base_layer" in cast(nn.Module, parent._modules[name])._modules:  # inside PEFT's adapters
        parent, name = cast(nn.Module, parent._modules[name]), "base_layer"
    layer = cast(nn.Module, parent._modules[name])
    if isinstance(layer, Quantized):
        return Room(parent, name, layer, _widen(layer, ranks, dtype, patch))
    module = adapted(layer, _empty(layer, ranks, dtype))
    patch.swap(parent, name, module, f"has a side branch of {ranks} ranks for adapters")
    return Room(parent, name, module, 0)


def sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs (times the window of a convolution) and outputs of a layer that can have adapters, else None."""
    if isinstance(layer, Quantized):
        return torch.Size(layer.shape[1:]).numel(), layer.shape[0]
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
        return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1], layer.out_channels
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else None


def _empty(layer: nn.Module, ranks: int, dtype: torch.dtype) -> LowRank:
    found = sizes(layer)
    assert found is not None
    device = _device(layer)
    down, up = (torch.zeros(size, dtype=dtype, device=device) for size in ((ranks, found[0]), (found[1], ranks)))
    return LowRank(down, up, torch.zeros(ranks, device=device))


def _device(layer: nn.Module) -> torch.device:
    if isinstance(layer, Quantized):
        return cast(torch.Tensor, layer._buffers["codes"]).device
    return cast(torch.Tensor, layer.weight).device


def _widen(layer: Quantized, ranks: int, dtype: torch.dtype, patch: Patch) -> int:
    """Append free ranks to the side branch; returns how many there were."""
    before = {name: layer._buffers[name] for name in ("down", "up", "rank_scale")}
    down, up, scale = before["down"], before["up"], before["rank_scale"]
    own = 0 if down is None else len(down)
    free = _empty(layer, ranks, dtype if down is None else down.dtype)
    if down is not None and up is not None:
        ones = torch.ones(own, device=down.device) if scale is None else scale
        free = LowRank(
            torch.cat([down, free.down]), torch.cat([up, free.up], 1), torch.cat([ones, cast(torch.Tensor, free.scale)])
        )
    layer.down, layer.up, layer.rank_scale = free.down, free.up, free.scale
    patch.undo(layer, f"has {ranks} more ranks in its side branch for adapters", partial(_narrow, layer, own, before))
    return own


def _narrow(layer: Quantized, own: int, before: dict[str, torch.Tensor | None]) -> None:
    """Give a layer its own side branch back, wherever and in whatever type it is by now."""
    for name, original in before.items():
        present = layer._buffers[name]
        if original is not None and present is not None:
            kept = present[:, :own] if name == "up" else present[:own]
            same = (kept.device, kept.dtype) == (original.device, original.dtype)
            original = original if same else kept.clone()
        setattr(layer, name, original)


@dataclass
class _Loaded:
    layers: Layers
    slots: torch.Tensor
    scale: float
    rank: int


class Adapters:
    """The adapters of a session: which are loaded, in which ranks, and with which weight."""

    def __init__(self, rooms: Mapping[Key, Room], ranks: int) -> None:
        self.rooms, self.ranks, self.calls = rooms, ranks, 0
        self._loaded: dict[str, _Loaded] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that are loaded."""
        return tuple(self._loaded)

    @property
    def scales(self) -> dict[str, float]:
        """The weight of each."""
        return {name: item.scale for name, item in self._loaded.items()}

    @property
    def free(self) -> int:
        """Ranks that are not in use."""
        return self.ranks - sum(len(item.slots) for item in self._loaded.values())

    def put(self, name: str, layers: Layers, scale: float = 1.0, *, instead_of: str | None = None) -> None:
        """Write an adapter into free ranks, or into those of another one. Raises before anything is changed."""
        if instead_of is not None:
            self._known(instead_of)
        if name in self._loaded and name != instead_of:
            raise HastenError(f"An adapter called {name!r} is loaded already; give this one another name.")
        rank = max((part.rank for part in layers.values()), default=0)
        slots = self._slots(name, rank, instead_of)
        self._check(name, layers)
        matrices = {key: part.read() for key, part in layers.items()}
        if instead_of is not None:
            self.remove(instead_of)
        for key, (down, up) in matrices.items():
            self.rooms[key].write(slots, down, up, scale * layers[key].scaling)
        self._loaded[name] = _Loaded(layers, slots, scale, rank)

    def weigh(self, name: str, scale: float) -> None:
        """Set the weight of an adapter."""
        item = self._known(name)
        item.scale = scale
        for key, part in item.layers.items():
            self.rooms[key].weigh(item.slots, scale * part.scaling)

    def remove(self, name: str) -> None:
        """Unload an adapter, and make its ranks free."""
        item = self._known(name)
        for key in item.layers:
            self.rooms[key].clear(item.slots)
        del self._loaded[name]

    def describe(self) -> str:
        """Which adapters are loaded, in words."""
        words = [f"{name} (rank {item.rank}, scale {item.scale:g})" for name, item in self._loaded.items()]
        return " and ".join(words) or "no adapter"

    def _known(self, name: str) -> _Loaded:
        if name not in self._loaded:
            raise UnknownName("adapter", name, self._loaded)
        return self._loaded[name]

    def _slots(self, name: str, rank: int, instead_of: str | None) -> torch.Tensor:
        taken = {int(slot) for other, item in self._loaded.items() if other != instead_of for slot in item.slots}
        free = [slot for slot in range(self.ranks) if slot not in taken]
        if len(free) < rank:
            raise HastenError(
                f"The adapter {name} has rank {rank}, and {len(free)} of {self.ranks} ranks are free; unload another "
                f"one, or open the session with LoRA(ranks={self.ranks - len(free) + rank})."
            )
        return torch.tensor(free[:rank])

    def _check(self, name: str, layers: Layers) -> None:
        missing = [key for key in layers if key not in self.rooms]
        if missing:
            raise HastenError(
                f"The adapter {name} has weights for {in_words(missing)}, where no room was made; open the session "
                f"with LoRA(layers=(...)) that names them."
            )


def in_words(keys: Iterable[Key]) -> str:
    """Name the first of some layers, and count the others."""
    paths = [f"{component}.{path}" for component, path in keys]
    return paths[0] + (f" and {len(paths) - 1} more layers" if len(paths) > 1 else "")
