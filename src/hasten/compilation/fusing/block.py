"""Runs a block from its declaration: each residual connection, the norm after it and its modulation in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hasten.compilation.fusing.attention import FusedAttention
from hasten.compilation.fusing.feed_forward import FusedFeedForward
from hasten.compilation.fusing.modules import by_name, coding_of, empty, norm_of, parameters, part
from hasten.compilation.fusing.segments import SegmentedLinear
from hasten.core.block import BlockPlan, Residual, Sublayer
from hasten.core.spec import Stack
from hasten.kernels.coded import Coded, Coding
from hasten.kernels.gated import activate
from hasten.kernels.residual import Added, Normalizing, add, add_and_normalize, normalize

Given = dict[str, Any]


class FusedBlock:
    """A link around a block's `forward`."""

    def __init__(
        self, block: nn.Module, plan: BlockPlan, stack: Stack, inside: Mapping[str, FusedAttention | FusedFeedForward]
    ) -> None:
        self.block, self.plan, self.stack, self.inside = block, plan, stack, dict(inside)
        self.names = parameters(block)
        self.ran = False
        """Written, never read, where code is compiled."""

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The block's output; what is not declared runs its own code."""
        given = by_name(self.names, args, kwargs)
        if self.block.training or not all(empty(self._said(name, given)) for name in self.plan.absent):
            return call(*args, **kwargs)
        self.ran = True
        run = _Run(self, given)
        for sublayer in self.plan.sublayers:
            run.add(sublayer)
        return run.output()

    def _said(self, name: str, given: Given) -> Any:
        return given.get(name, getattr(self.block, name, None))


class _Run:
    """One call of a block. What is to be added to a stream waits for the norm that comes next, to be done with it."""

    def __init__(self, fused: FusedBlock, given: Given) -> None:
        self.fused, self.given = fused, given
        self.block, self.plan = fused.block, fused.plan
        self.streams = {name: given[name] for name in fused.stack.takes}
        self.parts = self.plan.modulation(self.block, given) if self.plan.modulation else {}
        self.waiting: dict[str, Added] = {}

    def add(self, sublayer: Sublayer) -> None:
        """Run a module, and let its outputs wait to be added."""
        inputs = self._inputs(sublayer)
        module = getattr(self.block, sublayer.module)
        more = {own: self.given.get(name) for own, name in sublayer.given.items()}
        residuals = sublayer.residuals
        if sublayer.joined:
            outputs = self._joined(sublayer, module, inputs[0], more)
        else:
            named = {one.argument: x for one, x in zip(residuals, inputs, strict=True) if one.argument}
            unnamed = [x for one, x in zip(residuals, inputs, strict=True) if not one.argument]
            outputs = module(*unnamed, **named, **more)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for one, output in zip(residuals, outputs, strict=True):
            if one.stream in self.plan.ends:
                continue
            self._settle(one.stream)
            after = norm_of(part(self.block, one.after)) if one.after else None
            self.waiting[one.stream] = Added(output, self._part(one.gate), after)

    def output(self) -> Any:
        """The block's output."""
        for name in tuple(self.waiting):
            self._settle(name)
        ended = dict.fromkeys(self.plan.ends)
        return self.fused.stack.pack({**self.streams, **ended})

    def _inputs(self, sublayer: Sublayer) -> list[torch.Tensor | Coded]:
        first = sublayer.residuals[0]
        if sublayer.joined:
            streams = [self._settled(one.stream) for one in sublayer.residuals]
            return [normalize(streams, self._how(first, self._coding(sublayer, 0)))]
        return [self._input(one, self._coding(sublayer, place)) for place, one in enumerate(sublayer.residuals)]

    def _input(self, one: Residual, coding: Coding | None) -> torch.Tensor | Coded:
        """What a module is given of a stream."""
        if one.early:
            return normalize([self.given[one.stream]], self._how(one, coding))
        if not one.norm:
            return self._settled(one.stream)
        if one.stream not in self.waiting:
            return normalize([self.streams[one.stream]], self._how(one, coding))
        added = self.waiting.pop(one.stream)
        self.streams[one.stream], found = add_and_normalize(self.streams[one.stream], added, self._how(one, coding))
        return found

    def _how(self, one: Residual, coding: Coding | None) -> Normalizing:
        return Normalizing(norm_of(part(self.block, one.norm)), self._part(one.shift), self._part(one.scale), coding)

    def _part(self, name: str) -> torch.Tensor | None:
        return self.parts[name] if name else None

    def _settle(self, stream: str) -> None:
        """Add what waits."""
        if stream in self.waiting:
            self.streams[stream] = add(self.streams[stream], self.waiting.pop(stream))

    def _settled(self, stream: str) -> torch.Tensor:
        self._settle(stream)
        return self.streams[stream]

    def _coding(self, sublayer: Sublayer, place: int) -> Coding | None:
        """How the input of a sublayer may be rounded beforehand."""
        inside = self.fused.inside.get(sublayer.module)
        device = self.streams[sublayer.residuals[place].stream].device
        if isinstance(inside, FusedFeedForward):
            return inside.coding(device)
        if inside is None:
            return None
        beside = [part(self.block, sublayer.beside.enters)] if sublayer.beside else []
        return inside.coding(place, device, beside)

    def _joined(
        self, sublayer: Sublayer, module: Any, x: torch.Tensor | Coded, more: Given
    ) -> tuple[torch.Tensor, ...]:
        """The module's output, projected with that of the feed-forward beside it, and cut into the streams."""
        first = sublayer.residuals[0]
        found = module(**{first.argument: x}, **more) if first.argument else module(x, **more)
        if sublayer.beside is not None:
            entered = part(self.block, sublayer.beside.enters)(x)
            last = part(self.block, sublayer.beside.leaves)
            if isinstance(last, SegmentedLinear):
                coding = coding_of([last.second], entered.device)
                found = last(found, activate(entered, sublayer.beside.activation, None, coding))
            else:
                found = last(torch.cat([found, activate(entered, sublayer.beside.activation)], -1))  # pyright: ignore
        sizes = [self.streams[one.stream].shape[1] for one in sublayer.residuals]
        return tuple(found.split(sizes, 1))
