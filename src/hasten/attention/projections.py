"""Several linear layers on one input as one product, while each keeps its name, its place and its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from hasten.core.intercept import base_class


@dataclass(frozen=True)
class Place:
    """Where a linear layer is: a module's child, possibly inside an adapter (PEFT keeps it as `base_layer`)."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """What is there now."""
        return cast(nn.Module, self.parent._modules[self.name])

    @classmethod
    def find(cls, owner: nn.Module, name: str) -> Place | None:
        """The layer under a name of `owner`, inside whatever adapters stand around it, or None."""
        place = cls(owner, name)
        if owner._modules.get(name) is None:
            return None
        while "base_layer" in place.module._modules:
            place = cls(place.module, "base_layer")
        return place


@dataclass(eq=False)
class FusedProjections:
    """Layers of one input whose weights are stacked in one layer, `owner.<name>`, and what of its output is left.

    The first part that is called computes all; the others take theirs when they are given the same tensor. A part
    that is given another one computes anew, so a wrong guess about the model costs time, never a result.
    """

    owner: nn.Module
    name: str
    sizes: tuple[int, ...]
    ran: bool = False
    """Has it computed? Written, never read, where code is compiled: reading would make compiled code depend on it."""
    _given: torch.Tensor | None = None
    _left: list[torch.Tensor | None] = field(default_factory=list["torch.Tensor | None"])

    def __post_init__(self) -> None:
        self._left = [None] * len(self.sizes)

    @property
    def layer(self) -> nn.Module:
        """The layer that computes all parts, also after another technique has replaced it."""
        return cast(nn.Module, getattr(self.owner, self.name))

    def part(self, index: int, given: torch.Tensor) -> torch.Tensor:
        """The output of one of the layers."""
        if self._given is not given or self._left[index] is None:
            self._left = list(self.layer(given).split(self.sizes, dim=-1))
            self._given = given
            self.ran = True
        found = cast(torch.Tensor, self._left[index])
        self._left[index] = None
        if all(one is None for one in self._left):
            self._given = None
        return found

    def rows(self, index: int) -> slice:
        """Which rows of the stacked weight belong to a layer."""
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])


class ProjectionPart(nn.Linear):
    """One of the layers that were stacked. It has no parameters; `weight` and `bias` are views of the stack.

    It is a `Linear`, so that adapters can stand around it.
    """

    def __init__(self, group: FusedProjections, index: int, original: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        self._group, self._index = group, index
        self.training = original.training

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.Linear
        """This part's share of the common product."""
        return self._group.part(self._index, input)

    @property
    def computed_by(self) -> nn.Module:
        """The layer that the input goes to: what it is given must suit that one."""
        return self._group.layer

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A view of this part's rows."""
        return cast(torch.Tensor, self._group.layer.weight)[self._group.rows(self._index)]

    @property
    def bias(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A view of this part's numbers, or None."""
        whole = cast("torch.Tensor | None", self._group.layer.bias)
        return None if whole is None else whole[self._group.rows(self._index)]


def stacked(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer whose output is those of `layers` one after the other; missing biases become zeros."""
    first = layers[0]
    size = sum(layer.out_features for layer in layers)
    made = nn.Linear(first.in_features, size, any(_has_bias(layer) for layer in layers), device="meta")
    learns = first.weight.requires_grad
    made.weight = nn.Parameter(torch.cat([layer.weight.data for layer in layers]), requires_grad=learns)
    if _has_bias(made):
        made.bias = nn.Parameter(torch.cat([_bias(layer) for layer in layers]), requires_grad=learns)
    return made.train(first.training)


def _bias(layer: nn.Linear) -> torch.Tensor:
    return layer.bias.data if _has_bias(layer) else layer.weight.data.new_zeros(layer.out_features)


def _has_bias(layer: nn.Linear) -> bool:
    return layer._parameters["bias"] is not None


def obstacle(layers: Sequence[nn.Module]) -> str | None:
    """Why these layers cannot be stacked, or None."""
    for layer in layers:
        if base_class(layer) is not nn.Linear:
            return f"its projections are {base_class(layer).__name__}, not plain linear layers"
        hooks: Any = (layer._forward_hooks, layer._forward_pre_hooks, "forward" in layer.__dict__)
        if any(hooks):
            return "other code (an offload or casting hook) stands around its projections; fuse them before that"
        if cast(nn.Linear, layer).in_features != cast(nn.Linear, layers[0]).in_features:
            return "its projections take inputs of different sizes"
    weights = [cast(nn.Linear, layer).weight for layer in layers]
    if len({(weight.dtype, weight.device) for weight in weights}) > 1:
        return "the weights of its projections differ in type or device"
    return None


class Storage:
    """The memory of layers that were stacked: given up while the stack is in use, and filled from it again."""

    def __init__(self, layers: Sequence[nn.Linear], stack: nn.Linear, group: FusedProjections) -> None:
        self._layers, self._stack, self._group = layers, stack, group
        self._strides: list[tuple[int, ...]] = []

    def release(self) -> None:
        """Empty the layers' parameters; the objects stay."""
        for parameter, _ in self._pairs():
            self._strides.append(parameter.stride())
            parameter.data = parameter.data.new_empty(0)

    def refill(self) -> None:
        """Fill the parameters with their rows, wherever and in whatever type the stack is now."""
        for (parameter, rows), strides in zip(self._pairs(), self._strides, strict=False):
            new = torch.empty_strided(rows.shape, strides, dtype=rows.dtype, device=rows.device)
            parameter.data = new.copy_(rows)

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for index, layer in enumerate(self._layers):
            yield layer.weight, self._stack.weight.data[self._group.rows(index)]
            if _has_bias(layer):
                yield layer.bias, self._stack.bias.data[self._group.rows(index)]
