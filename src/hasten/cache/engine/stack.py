"""Reuse of what a denoiser's block stacks add to the streams: the site that block caches share.

The first `front` blocks and the last `back` blocks are always computed; what the blocks between them added is kept,
or added again in their place. The module lists are iterated lazily (never replaced): on a reused step the
iteration simply leaves blocks out. Blocks keep their classes, so compiled blocks need no additional graphs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from hasten.cache.engine.site import Judge
from hasten.core.intercept import base_class
from hasten.core.patch import Patch
from hasten.core.spec import Stack
from hasten.core.target import Denoiser

Streams = dict[str, torch.Tensor]


class StackSite:
    """The blocks of one denoiser, over all its stacks; see `engine.site.Site`.

    With `front=0` nothing is computed before the decision, which then looks at the modulated input of the first
    block, as the specification declares it.
    """

    afresh: tuple[str, ...] = ("*controlnet*",)

    def __init__(self, denoiser: Denoiser, *, front: int = 1, back: int = 0) -> None:
        self._denoiser, self._front = denoiser, front
        self._stacks = tuple(stack for stack in denoiser.spec.stacks if len(denoiser.stack(stack)))
        counts = [len(denoiser.stack(stack)) for stack in self._stacks]
        self._offsets = [sum(counts[:index]) for index in range(len(counts))]
        # Looked up here and not in a block's call, where a model compiled as a whole could not.
        self.arguments = [_parameters(base_class(b)) for stack in self._stacks for b in denoiser.stack(stack)]
        self._after_middle = sum(counts) - back
        self._value: Streams | None = None
        self._judge: Judge | None = None
        self._kept: Streams = {}
        self._armed = self._keeping = self._reusing = self._blockwise = False
        self._beginning: torch.Tensor | None = None
        self._head: Streams = {}
        self._decided = False
        self._index: dict[int, int] = {}

    @property
    def kept(self) -> Streams | None:
        """What the blocks between front and back added to each stream."""
        return self._kept if self._stacks[0].denoised in self._kept else None

    @property
    def served(self) -> bool:
        """Were they left out?"""
        return self._reusing

    def install(self, patch: Patch) -> None:
        """Intercept the iteration of each stack."""
        for stack, offset in zip(self._stacks, self._offsets, strict=True):
            modules = self._denoiser.stack(stack)
            patch.around(modules, self._iterating(stack, offset), "blocks are iterated lazily", method="__iter__")
            for index, block in enumerate(modules, offset):
                self._index |= {id(part): index for part in block.modules()}
        patch.foretell(self._denoiser.module, self._will_run)

    def keep(self) -> None:
        """Compute all blocks and keep what those in the middle add."""
        self._keeping = True

    def reuse(self, value: Streams) -> None:
        """Add `value` in place of the blocks in the middle."""
        self._value = value

    def ask(self, judge: Judge) -> None:
        """Decide after the front."""
        self._judge = judge

    def rest(self) -> None:
        """Leave calls alone."""
        self._keeping = self._reusing = self._decided = False
        self._value = self._judge = self._beginning = None
        self._kept, self._head = {}, {}

    def run(self, call: Callable[..., Any], given: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
        """Make the call with the lists armed."""
        self._armed = self._keeping or self._value is not None or self._judge is not None
        self._blockwise = any("controlnet" in name for name, value in given.items() if value is not None)
        try:
            return call(*args, **kwargs)
        finally:
            self._armed = False
            self._head = {}

    def _iterating(self, stack: Stack, offset: int) -> Callable[..., Iterator[Any]]:
        def iterate(call: Callable[..., Iterator[nn.Module]]) -> Iterator[Any]:
            # Unarmed, foreign code (saving, LoRA, offload) must see the modules themselves.
            return self._blocks(stack, list(call()), offset) if self._armed else call()

        return iterate

    def _blocks(self, stack: Stack, blocks: list[nn.Module], offset: int) -> Iterator[Any]:
        for index, block in enumerate(blocks, offset):
            is_middle = self._is_middle(index)
            if is_middle and self._reusing and not self._blockwise:
                continue
            edge = index in (0, self._front - 1, self._after_middle - 1)
            yield SeenBlock(block, stack, index, self) if edge or (is_middle and self._blockwise) else block

    def _is_middle(self, index: int) -> bool:
        return self._front <= index < self._after_middle

    def _will_run(self, module: nn.Module) -> bool | None:
        """What `core.foresight` asks: blocks in the middle are left out when a value is to be added in their place."""
        index = self._index.get(id(module))
        if index is None or not self._is_middle(index):
            return True
        if self._reusing or self._value is not None:
            return False
        return True if self._judge is None or self._decided else None

    def enter(self, block: SeenBlock, before: Streams, arguments: Mapping[str, Any]) -> Streams | None:
        """Before a block runs: returns the streams to pass on in its place, or None to run it."""
        if block.index == 0:
            self._beginning = before[block.stack.denoised]
            if self._front == 0:
                return self._decide(before, lambda: (block.indicator(arguments), None))
        return before if self._reusing and self._is_middle(block.index) else None

    def leave(self, block: SeenBlock, before: Streams, after: Streams) -> Streams:
        """After a block has run: returns the streams to pass on."""
        if block.index == self._front - 1:
            return self._decide(after, lambda: (after[block.stack.denoised], self._beginning)) or after
        if self._blockwise and self._is_middle(block.index):
            self._add_up(before, after)
        if block.index == self._after_middle - 1 and not self._reusing:
            self._kept = self._head if self._blockwise else _difference(after, self._head)
        return after

    def _decide(
        self, streams: Streams, signal: Callable[[], tuple[torch.Tensor, torch.Tensor | None]]
    ) -> Streams | None:
        """At the end of the front: the streams with the value added when it is reused, otherwise None."""
        value = self._judge(*signal()) if self._judge is not None else self._value
        self._reusing, self._decided = value is not None, True
        if value is None:
            self._head = {} if self._blockwise else streams
            return None
        return streams | {name: streams[name] + added for name, added in value.items()}

    def _add_up(self, before: Streams, after: Streams) -> None:
        """Sum what the blocks add themselves: a ControlNet adds to the stream in between, afresh at each step."""
        for name, delta in _difference(after, before).items():
            self._head[name] = self._head[name] + delta if name in self._head else delta


def _difference(after: Streams, before: Streams) -> Streams:
    return {name: value - before[name] for name, value in after.items() if _alike(value, before.get(name))}


def _alike(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


class SeenBlock:
    """A block seen through its named streams; reads of attributes reach the block itself."""

    def __init__(self, block: nn.Module, stack: Stack, index: int, site: StackSite) -> None:
        self._block, self.stack, self.index, self._site = block, stack, index, site

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, or only pass streams on in the form that it would return."""
        before = self.stack.read(args, kwargs)
        arguments = dict(zip(self._site.arguments[self.index], args, strict=False)) | kwargs
        passed = self._site.enter(self, before, arguments)
        if passed is None:
            after = cast(Streams, self.stack.unpack(self._block(*args, **kwargs)))
            passed = self._site.leave(self, before, after)
        return self.stack.pack(passed)

    def indicator(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """What the specification says of the block's modulated input."""
        assert self.stack.indicator is not None
        return self.stack.indicator(self._block, arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)


@functools.cache
def _parameters(block: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(block.forward).parameters)[1:]
