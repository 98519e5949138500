"""Values of sites as vectors: linear combinations, sizes, and whether all is finite."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils._pytree import tree_leaves, tree_map

from hasten.cache.engine.site import Value


def combine(weights: Sequence[float], values: Sequence[Value]) -> Value:
    """The sum of `weights[i] * values[i]`, computed in float32, in the type of the newest (last) value.

    What is no floating-point tensor is taken from the newest value. A single weight of 1 returns that very value.
    """
    if len(values) == 1 and weights[0] == 1:
        return values[0]
    newest, *older = reversed(values)
    return tree_map(lambda *leaves: _mixed(tuple(reversed(weights)), leaves), newest, *older)


def _mixed(weights: Sequence[float], leaves: Sequence[Any]) -> Any:
    newest = leaves[0]
    if not isinstance(newest, torch.Tensor) or not newest.is_floating_point():
        return newest
    total = newest.float() * weights[0]
    for weight, leaf in zip(weights[1:], leaves[1:], strict=True):
        total.add_(cast(torch.Tensor, leaf), alpha=weight)
    return total.to(newest.dtype)


def owned(value: Value) -> Value:
    """`value` in memory of its own: the outputs of a CUDA graph are overwritten when the graph runs again."""
    if not _graphs_run(value):
        return value
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)


def _graphs_run(value: Value) -> bool:
    found = next(tensors(value), None)
    if found is None or not found.is_cuda:
        return False
    module = sys.modules.get("torch._inductor.cudagraph_trees")
    if module is None:
        return False
    manager = module.get_manager(found.device.index or 0, create_if_none_exists=False)
    return manager is not None


def tensors(value: Value) -> Iterator[torch.Tensor]:
    """The tensors of a value."""
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def size_in_bytes(value: Value) -> int:
    """Memory of a value's tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))
