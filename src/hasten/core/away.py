"""Weights that one technique has taken off the device, or answers for, for good: others do not touch them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn

_AWAY: WeakKeyDictionary[nn.Module, list[torch.Tensor]] = WeakKeyDictionary()


def take_away(network: nn.Module, tensors: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Note that these parameters and buffers of a network are taken care of; returns what ends that."""
    taken = list(tensors)
    _AWAY.setdefault(network, []).extend(taken)
    return partial(_end, network, {id(tensor) for tensor in taken})


def taken_away(network: nn.Module) -> list[torch.Tensor]:
    """The weights of a network that are taken care of."""
    return _AWAY.get(network, [])


def _end(network: nn.Module, taken: set[int]) -> None:
    _AWAY[network] = [tensor for tensor in _AWAY.get(network, []) if id(tensor) not in taken]
