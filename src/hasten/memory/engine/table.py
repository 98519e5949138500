"""A table of what linears put out at every step of a schedule, and the calls that are answered from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hasten.core.target import Denoiser
from hasten.memory.engine.residency import Residency
from hasten.memory.engine.weights import Unit

Inputs = dict[str, torch.Tensor]
"""Input of each linear by its path."""


class Slot:
    """One linear: its path, its weights as a unit, and the output that is to be handed out."""

    def __init__(self, path: str, module: nn.Module, unit: Unit) -> None:
        self.path, self.module, self.unit = path, module, unit
        self.value: torch.Tensor | None = None
        self.answered = 0


class Given(Mapping[str, Any]):
    """A call's arguments by name; notes which of them were read."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values, self.read = values, set[str]()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def replaced(self, name: str, value: Any) -> Given:
        """The same with another value for one argument."""
        return Given({**self._values, name: value})


class Condition:
    """All that the table depends on besides the timestep; keeps the tensors alive."""

    def __init__(self, given: Given, spare: tuple[str, ...]) -> None:
        names = sorted(name for name in given.read if name not in spare and name in given)
        leaves = [leaf for name in names for leaf in tree_leaves(given[name])]
        self._kept = [(leaf, _version(leaf)) for leaf in leaves]

    def same(self, other: Condition) -> bool:
        """Are these the very same objects, unchanged?"""
        pairs = zip(self._kept, other._kept, strict=False)
        return len(self._kept) == len(other._kept) and all(
            (one is two or (not isinstance(one, torch.Tensor) and one == two)) and version == other_version
            for (one, version), (two, other_version) in pairs
        )

    def equal(self, other: Condition) -> bool:
        """Are these equal values, in other tensors? Waits for the GPU."""
        pairs = list(zip(self._kept, other._kept, strict=False))
        unchanged = all(_version(leaf) == version for leaf, version in self._kept)
        return unchanged and len(self._kept) == len(other._kept) and all(_equal(a, b) for (a, _), (b, _) in pairs)


def _version(leaf: object) -> int:
    """How often a tensor was written into; those made in inference mode do not count it."""
    return leaf._version if isinstance(leaf, torch.Tensor) and not leaf.is_inference() else 0


def _equal(one: object, other: object) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other or one == other
    return one is other or (
        one.device == other.device and one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    )


class Table:
    """Outputs of all linears for all steps: for each linear [steps, *shape of its output in one call]."""

    def __init__(self, inputs: list[Inputs], condition: Condition, branch: str = "") -> None:
        self.branch = branch
        self.wrong = False
        """Was a step given other inputs than the table was made from?"""
        self.inputs = {path: torch.stack([step[path] for step in inputs]) for path in inputs[0]}
        self.condition = condition
        self.steps = len(inputs)
        self.outputs: dict[str, torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        """Size of the outputs."""
        return sum(output.numel() * output.element_size() for output in self.outputs.values())

    def compute(self, slots: list[Slot], residency: Residency) -> None:
        """Fill the table: one product a linear, whose weights come to the device one after the other."""
        for slot in slots:
            if slot.path in self.inputs:
                self.outputs[slot.path] = run(slot, self.inputs[slot.path], residency)
        residency.finish()

    def batch(self) -> int:
        """Rows of one call."""
        return next((value.shape[1] for value in self.inputs.values()), 0)


def run(slot: Slot, inputs: torch.Tensor, residency: Residency) -> torch.Tensor:
    """Compute a linear with its own weights, brought in for it."""
    residency.enter(slot.unit)
    try:
        return slot.module(inputs)
    finally:
        residency.leave(slot.unit)


def timed_linears(denoiser: Denoiser) -> dict[str, nn.Module]:
    """The linears of a denoiser that depend on time, guidance and pooled text alone, by path."""
    return {
        path: module
        for path, module in denoiser.module.named_modules()
        if any(fnmatchcase(path, glob) for glob in denoiser.spec.timed)
    }


def by_path(pairs: Iterable[tuple[str, torch.Tensor]], paths: Iterable[str]) -> Inputs:
    """The inputs of the linears that the globs name."""
    known = list(paths)
    return {path: value for glob, value in pairs for path in known if fnmatchcase(path, glob)}
