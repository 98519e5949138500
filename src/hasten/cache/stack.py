"""Reuse of what a denoiser's block stacks add to the streams: the site that block caches share.

The module lists are iterated lazily (never replaced): the first block runs, a decision is made, and on a reused
step the iteration simply ends there. Blocks keep their classes, so compiled blocks need no additional graphs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

from hasten.core.patch import Patch
from hasten.core.spec import Stack
from hasten.core.target import Denoiser

Streams = dict[str, torch.Tensor]
Decide = Callable[[torch.Tensor, torch.Tensor, bool], bool]
"""Given the denoised stream before and after the first block, and whether a fitting residual is there at all,
decide whether to reuse what the rest added."""


class StackRun:
    """What one guidance branch remembers between steps: the sum that the blocks after the first added."""

    def __init__(self) -> None:
        self.residual: Streams = {}
        self.growing: Streams = {}

    def fits(self, streams: Streams, denoised: str) -> bool:
        """Can the remembered residual be added to these streams? Not after a change of batch, size or dtype."""
        return denoised in self.residual and all(
            _alike(value, streams.get(name)) for name, value in self.residual.items()
        )


class StackReuse:
    """Runs a denoiser's stacks through a decision after the first block; one per denoiser and session."""

    def __init__(self, denoiser: Denoiser, select: Callable[[], tuple[StackRun, Decide]]) -> None:
        self._denoiser, self._select = denoiser, select
        self._stacks = tuple(stack for stack in denoiser.spec.stacks if len(denoiser.stack(stack)))
        self._names = tuple(inspect.signature(denoiser.module.forward).parameters)
        self._run, self._decide = StackRun(), _never
        self._armed = self._skipping = self._blockwise = False

    @property
    def skipped(self) -> bool:
        """Did the latest call reuse the residual?"""
        return self._skipping

    def install(self, patch: Patch) -> None:
        """Intercept the denoiser's call and the iteration of each of its stacks."""
        patch.around(self._denoiser.module, self._on_call, "decides per step whether its blocks are computed")
        for stack in self._stacks:
            modules = self._denoiser.stack(stack)
            patch.around(modules, self._iterating(stack), "blocks are iterated lazily", method="__iter__")

    def _on_call(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._run, self._decide = self._select()
        self._armed, self._skipping = True, False
        given = dict(zip(self._names, args, strict=False)) | kwargs
        self._blockwise = any("controlnet" in name for name, value in given.items() if value is not None)
        try:
            return call(*args, **kwargs)
        finally:
            self._armed = False
            self._run.growing = {}

    def _iterating(self, stack: Stack) -> Callable[..., Iterator[Any]]:
        def iterate(call: Callable[..., Iterator[nn.Module]]) -> Iterator[Any]:
            # Unarmed, foreign code (saving, LoRA, offload) must see the modules themselves.
            return self._blocks(stack, list(call())) if self._armed else call()

        return iterate

    def _blocks(self, stack: Stack, blocks: list[nn.Module]) -> Iterator[Any]:
        for index, block in enumerate(blocks):
            if self._skipping and not self._blockwise:
                return
            is_head = stack is self._stacks[0] and index == 0
            is_tail = stack is self._stacks[-1] and index == len(blocks) - 1
            if is_head:
                yield SeenBlock(block, stack, self._head)
            elif self._blockwise:
                yield SeenBlock(block, stack, self._each, skip=self._skipping)
                if is_tail:
                    self._finish()
            else:
                yield SeenBlock(block, stack, self._tail) if is_tail else block

    def _head(self, before: Streams, after: Streams) -> Streams:
        denoised = self._stacks[0].denoised
        possible = self._run.fits(after, denoised)
        self._skipping = self._decide(before[denoised], after[denoised], possible) and possible
        if self._skipping:
            return after | {name: after[name] + value for name, value in self._run.residual.items()}
        # The old residual goes at once: a call that ends early must not leave it beside the new step's decision.
        self._run.residual, self._run.growing = {}, {} if self._blockwise else after
        return after

    def _tail(self, before: Streams, after: Streams) -> Streams:
        head = self._run.growing
        self._run.residual = {name: v - head[name] for name, v in after.items() if _alike(v, head.get(name))}
        return after

    def _each(self, before: Streams, after: Streams) -> Streams:
        """Sum what the blocks add themselves: a ControlNet adds to the stream in between, afresh at each step."""
        grown = self._run.growing
        for name, value in after.items():
            if _alike(value, before.get(name)):
                delta = value - before[name]
                grown[name] = grown[name] + delta if name in grown else delta
        return after

    def _finish(self) -> None:
        if not self._skipping:
            self._run.residual, self._run.growing = self._run.growing, {}


def _never(before: torch.Tensor, after: torch.Tensor, possible: bool) -> bool:
    return False


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


class SeenBlock:
    """A block seen through its named streams; with `skip` it passes them on; reads of attributes reach the block."""

    def __init__(
        self, block: nn.Module, stack: Stack, after: Callable[[Streams, Streams], Streams], *, skip: bool = False
    ) -> None:
        self._block, self._stack, self._change, self._skip = block, stack, after, skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or only pass its streams on in the form that it would return."""
        before = self._stack.read(args, kwargs)
        if self._skip:
            return self._stack.pack(before)
        streams = cast(Streams, self._stack.unpack(self._block(*args, **kwargs)))
        return self._stack.pack(self._change(before, streams))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)
