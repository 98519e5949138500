"""Moves tensors where modules on different devices meet.

Whatever a module returns goes back to the device that its inputs came from. So its caller, a cache that keeps what
blocks add, or a ControlNet that adds something between two blocks, never sees another device than its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hasten.core.errors import HastenError
from hasten.core.patch import Patch
from hasten.memory.engine.components import ENTRIES, is_compiled
from hasten.memory.engine.placement import Placed
from hasten.memory.engine.places import device_of
from hasten.memory.engine.weights import Weight, like, own_tensors


class Borders:
    """What is on which device, and how much has passed between devices."""

    def __init__(self, home: str) -> None:
        self.crossings = 0
        """Calls whose inputs or outputs changed devices."""
        self.calls = 0
        self.bytes = 0
        self._here = [home]

    def call(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run on a device, with the inputs brought there and the outputs brought back."""
        back = self._here[-1]
        source = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), None)
        (args, kwargs), brought = self._moved((args, kwargs), place, back)
        self._here.append(place)
        try:
            output = run(*args, **kwargs)
        finally:
            self._here.pop()
        returned = 0
        if source is not None:
            output, returned = self._moved(output, _name(source, back), place)
        self.calls += 1
        self.bytes += brought + returned
        self.crossings += bool(brought or returned)
        return output

    def _moved(self, value: Any, place: str, source: str) -> tuple[Any, int]:
        """The value with all tensors on a device, and the bytes that had to be copied."""
        leaves, form = tree_flatten(value)
        apart = place != source and place.startswith("cpu") and source.startswith("cpu")  # in a rehearsal
        device, copied = device_of(place), 0
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                if apart or leaf.device != device:
                    leaves[index] = carry(leaf, place)
                    copied += leaf.numel() * leaf.element_size()
            elif _holds_tensors(leaf):
                attributes, size = self._moved(dict(vars(leaf)), place, source)
                if size:
                    leaves[index] = copy.copy(leaf)
                    vars(leaves[index]).update(attributes)
                    copied += size
        return (tree_unflatten(leaves, form), copied) if copied else (value, 0)


def _holds_tensors(leaf: Any) -> bool:
    """Is it a plain object with tensors in it, such as the distribution that a VAE's encoder returns?"""
    held = getattr(leaf, "__dict__", None)
    if not held or isinstance(leaf, nn.Module | type):
        return False
    return any(isinstance(value, torch.Tensor) for value in held.values())


def carry(data: torch.Tensor, place: str) -> torch.Tensor:
    """A copy of a tensor on a device; all that passes between devices goes through here."""
    return data.to(device_of(place), copy=True)


def _name(device: torch.device, back: str) -> str:
    """The place to return to: where the inputs were; in host memory, the one that the caller runs on."""
    if device.type == "cpu":
        return back if back.startswith("cpu") else "cpu"
    return str(device)


def put(piece: Placed) -> Callable[[], None]:
    """Bring a piece's weights to its device; returns what brings them back."""
    weights = [Weight(tensor) for tensor in piece.tensors]
    device = device_of(piece.place)
    for weight in weights:
        if weight.home.device != device or piece.place.startswith("cpu:"):
            weight.settle(like(weight.home, device).copy_(weight.home))

    def restore() -> None:
        for weight in weights:
            weight.adopt()
            weight.restore()

    return restore


def intercept_borders(placed: Iterable[Placed], borders: Borders, patch: Patch) -> None:
    """Intercept every component, and every module inside one that is on another device than its surroundings."""
    pieces = list(placed)
    for piece in pieces:
        if piece.is_component:
            link = crossing(piece, borders, Running(), _cut(piece, pieces))
            for method in ENTRIES:
                if callable(getattr(piece.module, method, None)):
                    patch.around(piece.module, link, f"runs on {piece.place}", method=method)
        elif piece.place != piece.above:
            _intercept_inside(piece, pieces, borders, patch)


def _cut(component: Placed, pieces: Iterable[Placed]) -> dict[str, nn.Module]:
    """The modules of a component, itself included, that have something on another device inside."""
    found: dict[str, nn.Module] = {}
    for piece in pieces:
        path = piece.name
        while path.startswith(f"{component.name}.") and piece.place != piece.above:
            path = path.rpartition(".")[0]
            found[path] = component.module.get_submodule(path.removeprefix(component.name).removeprefix("."))
    return found


def _intercept_inside(piece: Placed, pieces: list[Placed], borders: Borders, patch: Patch) -> None:
    """A module, and what holds weights inside it, as some models run parts of a block from outside."""
    own, running = {id(tensor) for tensor in piece.tensors}, Running()
    placed = [other.module for other in pieces if other.place != other.above]
    patch.around(piece.module, crossing(piece, borders, running), f"runs on {piece.place}", innermost=True)
    for module in piece.module.modules():
        if module not in placed and own.intersection(map(id, own_tensors(module))):
            link, what = crossing(piece, borders, running), f"is on {piece.place} also when called alone"
            patch.around(module, link, what, innermost=True)


class Running:
    """Is a piece being run as a whole?"""

    def __init__(self) -> None:
        self.depth = 0


def crossing(
    piece: Placed, borders: Borders, running: Running, cut: Mapping[str, nn.Module] | None = None
) -> Callable[..., Any]:
    """A link that runs a call on the piece's device; what is `cut` over several devices must not be compiled whole."""
    split = dict(cut or {})

    def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or running.depth:
            return call(*args, **kwargs)
        for path, module in split.items():
            if is_compiled(module):
                raise HastenError(
                    f"{path} is compiled as one piece, and its parts are on several devices; place it as a whole, or "
                    f"compile smaller parts."
                )
        running.depth += 1
        try:
            return borders.call(piece.place, call, args, kwargs)
        finally:
            running.depth -= 1

    return run
