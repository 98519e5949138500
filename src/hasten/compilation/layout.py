"""Looks at the layout of every activation and counts the copies that change one, in one call of a network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_MAKE_PICTURES = ("convolution", "upsample_nearest2d", "upsample_bilinear2d", "avg_pool2d", "constant_pad_nd")

_ORDERS: dict[tuple[int, ...], str] = {(0, 1, 2, 3): "NCHW", (0, 2, 3, 1): "NHWC", (0, 3, 1, 2): "NCHW seen as tokens"}
"""Layouts of pictures by the order of dimensions from the largest stride to the smallest."""


@dataclass
class LayoutCount:
    """What one call of a network was made of."""

    nhwc: int = 0
    """Pictures [batch, channels, rows, columns] that an operation has made, with the channels next to each other."""
    other: int = 0
    copies: Counter[str] = field(default_factory=Counter[str])
    """Operations that changed a picture's layout, by name."""

    def in_words(self) -> str:
        """The counts, one clause."""
        total = sum(self.copies.values())
        which = ", ".join(f"{count} by {name}" for name, count in self.copies.most_common())
        copies = f"layout copies that remain: {total} ({which})" if total else "no layout copy remains"
        return f"{self.nhwc} of {self.nhwc + self.other} activations in NHWC, {copies}"


def counted(run: Callable[[], object]) -> LayoutCount:
    """Run a network once, without its compiled code, and look at the result of each operation."""
    count = LayoutCount()
    # Compiled code cannot be looked into; what it was made from does the same in the same layouts.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _Looking(count):
        run()
    return count


class _Looking(TorchDispatchMode):
    """Follows pictures from the operations that make them to those that keep their shape; attention is no picture."""

    def __init__(self, count: LayoutCount) -> None:
        super().__init__()
        self._count = count
        self._pictures = cast("dict[torch.Tensor, bool]", WeakIdKeyDictionary())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not _is_view(func):
            name = func.overloadpacket.__name__
            given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
            for result in tree_leaves(output)[:1]:
                if isinstance(result, torch.Tensor) and result.dim() == 4:
                    self._look(name, given, result)
        return output

    def _look(self, name: str, given: list[torch.Tensor], result: torch.Tensor) -> None:
        before, after = layout_of(given[1] if name == "copy_" else given[0]) if given else "", layout_of(result)
        changed = bool(before and after) and before != after
        if changed:
            self._count.copies[name] += 1
        is_picture = name in _MAKE_PICTURES or any(value in self._pictures for value in given if value.dim() == 4)
        if is_picture or changed:
            self._pictures[result] = True
            self._count.nhwc += after == "NHWC"
            self._count.other += after not in ("NHWC", "")


def layout_of(value: torch.Tensor) -> str:
    """How a dense picture lies in memory; empty where its strides leave that open, and for what is no picture."""
    if value.dim() != 4 or min(value.shape[1:]) < 2:
        return ""
    order = sorted(range(4), key=lambda axis: (axis != 0, -value.stride(axis)))
    strides, expected = value.stride(), 1
    for axis in reversed(order):
        if value.shape[axis] > 1 and strides[axis] != expected:
            return ""
        expected *= value.shape[axis]
    return _ORDERS.get(tuple(order), "")


def _is_view(func: Any) -> bool:
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
