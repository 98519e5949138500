"""What one guidance branch of one request remembers: the latest computed values, and for which kind of call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from hasten.cache.engine.site import Value
from hasten.cache.engine.values import size_in_bytes
from hasten.core.clock import Moment


@dataclass(frozen=True)
class Snapshot:
    """A value and when it was computed."""

    moment: Moment
    value: Value


class History:
    """The latest computed values of one branch, newest last, all for the same kind of call."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._kind: object = None
        self.snapshots: list[Snapshot] = []

    def admit(self, kind: object) -> bool:
        """Begin a call of this kind; returns whether a change of kind has made what was remembered useless."""
        changed = self._kind is not None and kind != self._kind
        if changed:
            self.snapshots.clear()
        self._kind = kind
        return changed

    def add(self, snapshot: Snapshot) -> None:
        """Remember a computed value and let the oldest go."""
        self.snapshots.append(snapshot)
        del self.snapshots[: -self._capacity]

    def forget(self) -> None:
        """Drop all values."""
        self.snapshots.clear()

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(size_in_bytes(snapshot.value) for snapshot in self.snapshots)


def kind_of_call(given: Mapping[str, Any], varying: tuple[str, ...], module: nn.Module) -> object:
    """What must not change between computing and reusing: sizes, types, settings and adapters; not the numbers.

    `given` holds the call's arguments by name; those whose name matches a pattern of `varying` are left out.
    """
    arguments = [(name, value) for name, value in given.items() if value is not None and not _matches(name, varying)]
    return tuple((name, _shape_of(value)) for name, value in arguments), _adapters(module)


class Conditioning:
    """The tensors a call is given beside those that vary from step to step: which memory, not which numbers.

    Memory is told apart by weak references, which unlike addresses never come to mean something else.
    """

    def __init__(self, given: Mapping[str, Any], varying: tuple[str, ...]) -> None:
        others = [value for name, value in given.items() if not _matches(name, varying)]
        tensors = _tensors(others)
        self._memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._offsets = [tensor.storage_offset() for tensor in tensors]
        texts = _tensors([value for name, value in given.items() if _matches(name, _TEXTS)])
        self._texts = [StorageWeakRef(tensor.untyped_storage()) for tensor in texts]

    def same(self, other: Conditioning) -> bool:
        """Are they the very same tensors?"""
        return self._memory == other._memory and self._offsets == other._offsets

    def replaces(self, earlier: Conditioning) -> bool:
        """Is there another text beside that of `earlier`, which is still there?

        Some pipelines make the same text anew at each step; then the earlier one is gone.
        """
        pairs = zip(self._texts, earlier._texts, strict=False)
        return any(now != before and not before.expired() for now, before in pairs)


_TEXTS = ("encoder_hidden_states*",)
"""Patterns of arguments that hold texts, or pictures in their place."""


def _tensors(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


@functools.cache
def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _shape_of(value: Any) -> object:
    return _essence(value) if isinstance(value, torch.Tensor) else tuple(map(_essence, tree_leaves(value)))


def _essence(leaf: Any) -> object:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, str | bool | int | float | None) else type(leaf)


def _adapters(module: nn.Module) -> object:
    """Names, choice and strength of the LoRA adapters that PEFT has put into a denoiser, also layer by layer."""
    configurations = list(cast("dict[str, object]", getattr(module, "peft_config", None) or {}).values())
    if not configurations:
        return ()
    known, layers = _TUNED.get(module, ([], []))
    if not (len(known) == len(configurations) and all(a is b for a, b in zip(known, configurations, strict=True))):
        layers = [ref(part) for part in module.modules() if isinstance(getattr(part, "scaling", None), dict)]
        _TUNED[module] = configurations, layers
    tuned: list[Any] = [layer for each in layers if (layer := each()) is not None]
    strengths = tuple(tuple(layer.scaling.items()) for layer in tuned)
    return strengths, [(layer.active_adapters, layer.disable_adapters, layer.merged) for layer in tuned[:1]]


_TUNED: WeakKeyDictionary[nn.Module, tuple[list[object], list[ref[nn.Module]]]] = WeakKeyDictionary()
"""The tuned layers of each denoiser, and the adapter configurations for which they were looked up: finding them takes
longer than a reused step may. Layers can lead back to the denoiser, through hooks; so they are not held."""
