"""A device made of host memory: what is copied to it is counted, what runs on weights that are elsewhere is noted."""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hasten.core.session import Session
from hasten.core.technique import Technique
from hasten.memory.engine import moving
from hasten.memory.engine.copies import Arrival
from hasten.memory.engine.moving import Moved
from hasten.memory.engine.weights import Unit


class Device:
    """Takes the place of the copies to a GPU, and counts by itself."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.bytes = self.most = self.copies = 0
        self.log: list[int] = []
        """Address of the first tensor of each copy."""
        self.copying = False
        self._there: list[weakref.ref[torch.Tensor]] = []

    def begin(self, sources: Sequence[torch.Tensor]) -> Arrival:
        self.copying = True
        made = [torch.empty_like(source).copy_(source) for source in sources]
        self.copying = False
        self.bytes += sum(source.nbytes for source in sources)
        self.copies += 1
        self.log.append(sources[0].data_ptr())
        self._there += [weakref.ref(tensor) for tensor in made]
        self.most = max(self.most, self.present)
        return Arrival(made, lambda: None)

    @property
    def present(self) -> int:
        """Bytes that are there and not yet let go."""
        alive = [tensor for ref in self._there if (tensor := ref()) is not None]
        self._there = [weakref.ref(tensor) for tensor in alive]
        return sum(tensor.nbytes for tensor in alive)


class Watch(TorchDispatchMode):
    """Notes every operation that uses weights where they are at home."""

    def __init__(self, device: Device, units: Iterable[Unit]) -> None:
        super().__init__()
        self.device, self.found = device, set[str]()
        self._homes = {
            weight.home.untyped_storage().data_ptr(): unit.name
            for unit in units
            for weight in unit.weights
            if weight.home.numel()
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looking = not self.device.copying and func is not torch.ops.aten.detach.default  # what `.data` calls
        for leaf in tree_leaves((args, kwargs)) if looking else ():
            if isinstance(leaf, torch.Tensor) and (name := self._homes.get(leaf.untyped_storage().data_ptr())):
                self.found.add(f"{func} uses {name}")
        return func(*args, **(kwargs or {}))


def simulated(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Let weights be brought to a simulated device."""
    device = Device()
    monkeypatch.setattr(moving, "copies_to", lambda place: device)  # pyright: ignore[reportUnknownLambdaType]
    return device


def units(session: Session, technique: Technique) -> list[Unit]:
    """All units that a session moves."""
    components = session.state(technique, Moved).turns.components
    return [unit for component in components for unit in component.cut.units]


def copied(device: Device, among: Iterable[Unit]) -> list[str]:
    """Names of the units that were copied, in this order."""
    names = {unit.weights[0].home.data_ptr(): unit.name for unit in among}
    return [names[address] for address in device.log]


@contextmanager
def watching(device: Device, among: Iterable[Unit]) -> Generator[Watch]:
    """Fail if anything runs with weights elsewhere."""
    with Watch(device, among) as watch:
        yield watch
    assert not watch.found, sorted(watch.found)[:5]
