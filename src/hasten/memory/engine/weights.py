"""Weights and the units in which they move. A tensor object always stays; what moves are the data it holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from hasten.memory.engine.arena import Arena
from hasten.memory.engine.copies import Arrival


class Weight:
    """One parameter or buffer of a network, and its data at home: where they are while the network does not run."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.home = tensor.data
        self._device = tensor.device
        self._borrowed = False
        self._version = 0

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.home.numel() * self.home.element_size()

    def settle(self, home: torch.Tensor) -> None:
        """Keep the data at `home` from now on (equal values); what was there before is let go.

        That memory is lent: it goes back to whoever gave it when the weight is restored.
        """
        self.home = self.tensor.data = home
        self._borrowed = True

    def adopt(self, visiting: torch.Tensor | None = None) -> bool:
        """Take over data that other code has put in place of ours (another layout, a merged adapter), if it has."""
        present = self.tensor.data
        ours = (self.home,) if visiting is None else (self.home, visiting)
        if any(_same(present, known) for known in ours):
            return False
        self.home, self._borrowed = present.to(self.home.device), False
        return True

    def visit(self, data: torch.Tensor) -> None:
        """Hold a copy of the data at home."""
        self.tensor.data = data
        self._version = self.tensor._version

    def keep_changes(self, visiting: torch.Tensor) -> None:
        """Bring home what was written into the copy: running statistics, a state that was loaded."""
        if self.tensor._version != self._version and _same(self.tensor.data, visiting):
            self.home.copy_(visiting)

    def restore(self) -> None:
        """Give the tensor data on the device where they were, in the layout that they have."""
        away = self._borrowed or self.home.device != self._device
        self.tensor.data = like(self.home, self._device).copy_(self.home) if away else self.home


class Unit:
    """Weights that come and go together."""

    def __init__(self, name: str, tensors: Iterable[torch.Tensor], modules: Sequence[nn.Module] = ()) -> None:
        self.name, self.modules = name, tuple(modules)
        self.weights = [Weight(tensor) for tensor in tensors]
        self.lasting = False
        """Does it stay for a whole call of the network, so that it has no place in the order of those that pass?"""
        self.uses = 0
        self.present: list[torch.Tensor] | None = None
        """The data on the device of execution while they are there."""
        self.arriving = 0
        """Bytes of the latest copy to the device of execution."""
        self.arrival: Arrival | None = None
        """The copy that is on its way."""
        self.arena: Arena | None = None
        """The buffer that holds the homes of all weights one after the other, if one does."""

    @property
    def bytes(self) -> int:
        """Size of all weights."""
        return sum(weight.bytes for weight in self.weights)

    def sources(self) -> list[torch.Tensor]:
        """What has to be copied."""
        changed = [weight.adopt() for weight in self.weights]
        if any(changed):
            self.arena = None
        found = [weight.home for weight in self.weights] if self.arena is None else [self.arena.buffer]
        self.arriving = sum(source.numel() * source.element_size() for source in found)
        return found

    def install(self, copies: list[torch.Tensor]) -> None:
        """Let the network use the copies."""
        self.present = copies if self.arena is None else self.arena.views(copies[0])
        for weight, data in zip(self.weights, self.present, strict=True):
            weight.visit(data)

    def withdraw(self) -> None:
        """Let the network hold the data at home again."""
        for weight, data in zip(self.weights, self.present or (), strict=True):
            weight.keep_changes(data)
            if weight.adopt(data):
                self.arena = None
            weight.tensor.data = weight.home
        self.present = None

    def restore(self) -> None:
        """Put everything back where it was before."""
        for weight in self.weights:
            weight.adopt()
            weight.restore()
        self.arena = None


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers that a module holds itself."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def all_tensors(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module and its sub-modules, each once."""
    return list({id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in all_tensors(module))


def like(data: torch.Tensor, device: torch.device) -> torch.Tensor:
    """New memory for such data on a device, with the same strides where these leave no gaps."""
    if not dense(data):
        return torch.empty(data.shape, dtype=data.dtype, device=device)
    return torch.empty_strided(data.shape, data.stride(), dtype=data.dtype, device=device)


def dense(data: torch.Tensor) -> bool:
    """Does the tensor fill its memory without gaps or overlaps?"""
    if data.numel() == 0:
        return True
    return sum((n - 1) * s for n, s in zip(data.shape, data.stride(), strict=True)) + 1 == data.numel()


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    return (one.data_ptr(), one.stride(), one.dtype) == (other.data_ptr(), other.stride(), other.dtype)
