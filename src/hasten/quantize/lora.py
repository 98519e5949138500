"""Low-rank adapters (LoRA) as further ranks of side branches, on layers of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.core.errors import HastenError, InvalidSetting, NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload
from hasten.quantize.engine.adapter_layers import RANDOM, adaptable, layers_of, with_siblings
from hasten.quantize.engine.ranks import Adapters, Key, Layers, make_room, sizes

BUCKET = 16
"""Ranks are given out in multiples of it, as matrix products on a GPU come in such tiles."""


@dataclass(frozen=True, kw_only=True)
class LoRA(Technique):
    """Adds adapters from safetensors files beside the weights, quantized by whatever method or not at all.

    Each layer gets a side branch of `ranks` ranks, which all adapters share; with SVDQuant they follow the ranks of
    its own. Nothing is quantized again, and weights are not changed. `hasten.adapters(session)` loads, weights,
    exchanges and unloads adapters while the session is open: such a change writes into tensors that are there, so
    that nothing is compiled or recorded again. Names of diffusers, PEFT and kohya are understood, and the original
    ones of FLUX.1 and Stable Diffusion.
    """

    stage: ClassVar[Stage] = Stage.ADAPTERS
    lossy: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"

    adapters: tuple[str, ...] = field(
        default=(),
        metadata=about(f"files (or folders) with adapters; {RANDOM!r} is one of noise, to time it", trial=(RANDOM,)),
    )
    scales: tuple[float, ...] = field(
        default=(), metadata=about("the weight of each adapter, or one for all; () is 1", off=(0.0,))
    )
    ranks: int = field(
        default=0,
        metadata=about("room for adapters in each layer, in steps of 16; 0 is what the given ones need", ge=0, le=4096),
    )
    layers: tuple[str, ...] = field(
        default=(),
        metadata=about("patterns of further layers that get room, for adapters loaded later: component.path"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.scales) > 1 and len(self.scales) != len(self.adapters):
            raise InvalidSetting(f"LoRA has {len(self.adapters)} adapters and {len(self.scales)} scales.")

    def claims(self) -> tuple[str, ...]:
        """The room for adapters."""
        return ("adapters",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs adapters, or layers to make room in; files must be readable and fit the model."""
        try:
            if not self._rooms(target):
                yield "name files in adapters=(...), or layers=(...) and ranks=... to load adapters into later."
            elif self.ranks and (needed := self._needed(target)) > self._width(target):
                yield f"the adapters have {needed} ranks together, more than ranks={self.ranks}; set it higher."
        except HastenError as error:
            yield str(error)

    def apply(self, target: Target, patch: Patch) -> None:
        """Make room in every layer, and write the adapters into it."""
        ranks = self._width(target)
        state = patch.keep(Loaded({}, ranks, target))
        rooms = {}
        for component, path in self._rooms(target):
            network = target.modules[component]
            parent, _, name = path.rpartition(".")
            rooms[component, path] = make_room(_inside(network, parent), name, ranks, _dtype(network), patch)
        state.rooms = rooms
        for name, (adapter, scale) in zip(_names(self.adapters), self._weighted(), strict=True):
            state.put(name, layers_of(adapter, target), scale)
        for component in {component for component, _ in rooms}:
            network = target.modules[component]
            patch.around(network, state.count, "calls are counted")
            if hasattr(network, "save_pretrained"):
                patch.around(
                    network, _not_saved, "cannot be saved with adapters beside its layers", method="save_pretrained"
                )

    def engaged(self, session: Session) -> Evidence:
        """The side branches are in their places, and the networks have run with them."""
        return session.state(self, Loaded).evidence()

    def cost(self, target: Target, workload: Workload) -> Cost:
        """The matrices take memory; two thin products a layer take a little time."""
        known, ranks = adaptable(target), self._width(target)
        numbers = sum(sum(sizes(known[key]) or ()) for key in self._rooms(target)) * ranks
        return Cost(extra_bytes=numbers * target.dtype.itemsize)

    def _weighted(self) -> Iterator[tuple[str, float]]:
        scales = self.scales or (1.0,)
        yield from zip(self.adapters, scales if len(scales) > 1 else scales * len(self.adapters), strict=True)

    def _rooms(self, target: Target) -> list[Key]:
        named = {key for adapter in self.adapters for key in layers_of(adapter, target)}
        return with_siblings(named, self.layers, adaptable(target))

    def _needed(self, target: Target) -> int:
        return sum(_rank(layers_of(adapter, target)) for adapter in self.adapters)

    def _width(self, target: Target) -> int:
        return -(-(self.ranks or self._needed(target) or BUCKET) // BUCKET) * BUCKET


class Loaded(Adapters):
    """The adapters of a session, which may be changed while it is open; `hasten.adapters(session)` gives them."""

    def __init__(self, rooms: dict[Key, Any], ranks: int, target: Target) -> None:
        super().__init__(rooms, ranks)
        self._target = target

    def load(self, adapter: str | Path, *, name: str | None = None, scale: float = 1.0) -> str:
        """Load one more adapter from a file; returns the name it goes by. Raises HastenError where it does not fit."""
        chosen = name or _names((*self.names, str(adapter)))[-1]
        self.put(chosen, layers_of(str(adapter), self._target), scale)
        return chosen

    def set_scale(self, name: str, scale: float) -> None:
        """Weight an adapter; 0 switches it off."""
        self.weigh(name, scale)

    def swap(self, name: str, adapter: str | Path, *, scale: float | None = None) -> None:
        """Put another adapter in the place (and under the name) of one; keeps the scale unless told otherwise."""
        kept = self.scales.get(name, 1.0) if scale is None else scale
        self.put(name, layers_of(str(adapter), self._target), kept, instead_of=name)

    def unload(self, name: str) -> None:
        """Take an adapter off."""
        self.remove(name)

    def count(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A link around a network."""
        result = call(*args, **kwargs)
        self.calls += 1
        return result

    def evidence(self) -> Evidence:
        """What shows that the side branches took part; raises NotEngaged otherwise."""
        if not self.calls:
            raise NotEngaged("no network with adapters was called.")
        if gone := sum(not room.in_place for room in self.rooms.values()):
            raise NotEngaged(
                f"the side branches of {gone} of {len(self.rooms)} layers are not in their places any more."
            )
        return Evidence(
            summary=f"{self.describe()} in {self.ranks - self.free} of {self.ranks} ranks beside {len(self.rooms)} "
            f"layers took part in {self.calls} calls"
        )


def adapters(session: Session) -> Loaded:
    """The adapters of a session whose recipe has `LoRA`: to load, weight (`set_scale`), `swap` and `unload` them."""
    found = next((item for item in session.recipe if isinstance(item, LoRA)), None)
    if found is None:
        raise HastenError("This session has no adapters; add LoRA(...) to its recipe.")
    return session.state(found, Loaded)


def _names(adapters: tuple[str, ...]) -> list[str]:
    """A name for each file: that of the file, or of its folder; a number tells equal ones apart."""
    found: list[str] = []
    for adapter in adapters:
        path = Path(adapter)
        stem = path.parent.name if path.stem in ("pytorch_lora_weights", "adapter_model") else path.stem
        same = sum(one == stem or one.rpartition("-")[0] == stem for one in found)
        found.append(f"{stem}-{same + 1}" if same else stem)
    return found


def _rank(layers: Layers) -> int:
    return max((part.rank for part in layers.values()), default=0)


def _inside(network: nn.Module, path: str) -> nn.Module:
    """A sub-module by its path, which leaves out the adapters that modules on the way may be in."""
    module = network
    for name in path.split(".") if path else ():
        module = module.get_submodule(name)
        while "base_layer" in module._modules:
            module = module.get_submodule("base_layer")
    return module


def _dtype(network: nn.Module) -> torch.dtype:
    wide = (torch.float32, torch.bfloat16, torch.float16)
    return next((weight.dtype for weight in network.parameters() if weight.dtype in wide), torch.float32)


def _not_saved(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise HastenError(
        "The network cannot be saved while LoRA is applied: layers have other names; leave the session first."
    )
