"""FORA: on most steps reuse what attention and feed-forward put out, and compute only what depends on the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hasten.cache.problems import no_stack
from hasten.cache.runtime import BranchStore, Decisions
from hasten.cache.work import example_call, flops, stand_in
from hasten.core.clock import Clock
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.spec import Stack
from hasten.core.target import Denoiser, Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class FORA(Technique):
    """Computes everything at every `interval`-th step of a request; the steps between reuse each block's branches.

    A branch is an attention or feed-forward module whose output is gated and added to a stream. What is reused is
    its output before the gate; shift, scale and gate follow the present timestep. The outputs of all branches
    stay in memory, per guidance branch. A change of batch, size or dtype computes.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    lossy: ClassVar[bool] = True
    cuts_blocks: ClassVar[bool] = True
    paper: ClassVar[str] = "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration (2024), arXiv:2407.01425"

    interval: int = field(default=2, metadata=about("every how many steps all is computed", ge=1, off=1))

    def claims(self) -> tuple[str, ...]:
        """Decides which parts of blocks are computed."""
        return ("stack.compute:*",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs declared branches; a feed-forward that runs in chunks has no single output to keep."""
        yield from no_stack(target)
        for denoiser in target.denoisers:
            if not denoiser.spec.stacks:
                continue
            if not any(stack.branches for stack in denoiser.spec.stacks):
                yield f"the specification of {denoiser.spec.model_class} names no branches; use FirstBlockCache."
            elif any(getattr(block, "_chunk_size", None) for _, block in _blocks(denoiser)):
                yield "the feed-forward runs in chunks, so no single output can be kept; switch chunking off."

    def apply(self, target: Target, patch: Patch) -> None:
        """Install a cell around every branch of every denoiser."""
        decisions = patch.keep(Decisions())
        for denoiser in target.denoisers:
            branches = BranchReuse(denoiser)
            runner = _Runner(denoiser.name, branches, self.interval, patch.clock, decisions)
            patch.around(denoiser.module, runner, f"computes everything once in {self.interval} steps")
            branches.install(patch)

    def engaged(self, session: Session) -> Evidence:
        """Some denoiser calls took branch outputs of an earlier step."""
        return session.state(self, Decisions).evidence(type(self).__name__, may_never_reuse=self.interval == 1)

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Time is the mean share of operations: (1 + (interval - 1) * rest) / interval; memory is every output."""
        denoiser = stand_in(target.denoisers[0])
        arguments = example_call(denoiser, target, workload)
        branches, patch = BranchReuse(denoiser), Patch({}, Clock)
        branches.install(patch)
        branches.keep()
        full = flops(denoiser, arguments)
        outputs = branches.outputs()
        branches.reuse(outputs)
        rest = flops(denoiser, arguments) / full
        streams = 2 if denoiser.spec.guidance == "separate" else 1
        return Cost(
            time_factor=(1 + (self.interval - 1) * rest) / self.interval,
            extra_bytes=streams * sum(t.numel() * t.element_size() for t in tree_leaves(outputs)),
        )


class _Cell:
    """The output of one branch: put in by a computed step, taken out by a reused one.

    Compiled blocks look at `output` and the site's decision, nothing else, so that each kind of step has one
    graph; for which guidance branch the output is right, the site decides outside.
    """

    def __init__(self) -> None:
        self.output: Any = None
        self.spoilt = False


class BranchReuse:
    """All branches of one denoiser: each computes, or hands out what its cell holds.

    It does nothing until `keep` or `reuse` says what the next call is; `rest` must follow that call.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._cells: list[_Cell] = []
        self._branches: list[_Cell] = []
        self._given: list[_Cell] = []
        self.keeping = self.reusing = False

    def install(self, patch: Patch) -> None:
        """Intercept the branches of every block, and the sub-modules that do nothing but feed one of them."""
        for stack, block in _blocks(self._denoiser):
            for name in stack.branches:
                if (module := _part(block, name)) is not None:
                    cell = self._new_cell(self._branches)
                    patch.around(module, self._around(cell, cell, _itself), "its output is reused")
                    self._install_feeders(block, stack.feeders.get(name, ()), cell, patch)

    def _install_feeders(self, block: nn.Module, names: tuple[str, ...], fed: _Cell, patch: Patch) -> None:
        for name in names:
            if (module := _part(block, name)) is not None:
                link = self._around(self._new_cell(), fed, _hollow)
                patch.around(module, link, "is left out on reused steps")

    def _new_cell(self, *lists: list[_Cell]) -> _Cell:
        cell = _Cell()
        for cells in (self._cells, *lists):
            cells.append(cell)
        return cell

    def keep(self) -> None:
        """Let the next call compute everything and keep the outputs."""
        self.keeping = True

    def reuse(self, outputs: list[Any]) -> None:
        """Let the next call take these outputs, as `outputs` returned them."""
        self.reusing = True
        for cell, output in zip(self._cells, outputs, strict=True):
            cell.output = output
        self._given = [cell for cell in self._branches if cell.output is not None]

    def rest(self) -> None:
        """Forget all outputs and leave calls alone."""
        self.keeping = self.reusing = False
        self._given = []
        for cell in self._cells:
            cell.output = None

    def outputs(self) -> list[Any]:
        """What the latest call kept, or an empty list when nothing can be reused: a branch ran twice in it."""
        kept = [cell.output for cell in self._cells]
        usable = any(cell.output is not None for cell in self._branches)
        return kept if usable and not any(cell.spoilt for cell in self._cells) else []

    @property
    def served(self) -> bool:
        """Did the latest call really take an output it was given?"""
        return any(cell.output is None for cell in self._given)

    def _around(self, cell: _Cell, fed: _Cell, keepable: Callable[[Any], Any]) -> Callable[..., Any]:
        site = self

        def run(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if site.reusing and cell.output is not None and fed.output is not None:
                known, cell.output = cell.output, None
                return known
            output = call(*args, **kwargs)
            if site.keeping:
                if cell.output is not None:
                    cell.spoilt = True
                cell.output = keepable(output)
            return output

        return run


class _Kept:
    """One guidance branch: the outputs of its last complete step, and for which sizes of input they are right."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.sizes: list[Any] = []


class _Runner:
    """Decides for one denoiser before each call; the whole decision is known on the host."""

    def __init__(self, name: str, branches: BranchReuse, interval: int, clock: Clock, decisions: Decisions) -> None:
        self._name, self._branches, self._interval = name, branches, interval
        self._clock, self._decisions = clock, decisions
        self._store = BranchStore(_Kept)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        moment = self._clock.now
        kept, sizes = self._store.at(self._name, moment), _sizes((args, kwargs))
        self._prepare(kept, sizes, scheduled=moment.step % self._interval == 0)
        try:
            output = call(*args, **kwargs)
            reused = self._branches.served
            if self._branches.keeping:
                kept.outputs, kept.sizes = self._branches.outputs(), sizes
            if moment.last:
                kept.outputs = []  # the memory is wanted for decoding the picture
            self._decisions.record(self._name, moment, full=not reused)
        finally:
            self._branches.rest()
        return output

    def _prepare(self, kept: _Kept, sizes: list[Any], *, scheduled: bool) -> None:
        if not scheduled and kept.outputs and kept.sizes == sizes:
            self._branches.reuse(kept.outputs)
            return
        kept.outputs = []
        if self._interval > 1:
            self._branches.keep()


def _blocks(denoiser: Denoiser) -> Iterator[tuple[Stack, nn.Module]]:
    for stack in denoiser.spec.stacks:
        for block in denoiser.stack(stack):
            yield stack, block


def _part(block: nn.Module, path: str) -> nn.Module | None:
    """A sub-module of a block; None where this block goes without it, as the last one of SD3 does."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _sizes(arguments: object) -> list[Any]:
    """Shape, type and device of every tensor among a call's arguments."""
    tensors = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor))
    return [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]


def _itself(output: Any) -> Any:
    return output


def _hollow(output: Any) -> Any:
    """Stand-ins of an output that is not needed: the same structure, the last dimension empty."""
    if isinstance(output, tuple):
        return tuple(_hollow(part) for part in output)
    return output.new_empty((*output.shape[:-1], 0))
