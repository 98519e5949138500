"""Reuse of what attention and feed-forward put out, block by block: the site of FORA-like caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from hasten.cache.engine.site import Judge
from hasten.cache.engine.values import owned
from hasten.core.patch import Patch
from hasten.core.spec import Stack
from hasten.core.target import Denoiser


class _Cell:
    """The output of one branch: put in by a computed step, taken out by a reused one.

    Compiled blocks look at `output` and the site's decision, nothing else, so that each kind of step has one
    graph; for which guidance branch the output is right, the site decides outside.
    """

    def __init__(self) -> None:
        self.output: Any = None
        self.spoilt = False


class BranchSite:
    """All branches of one denoiser: each computes, or hands out what its cell holds; see `engine.site.Site`.

    What is reused is a branch's output before the gate; shift, scale and gate follow the present timestep.
    """

    afresh: tuple[str, ...] = ()

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._cells: list[_Cell] = []
        self._branches: list[_Cell] = []
        self._given: list[_Cell] = []
        self.keeping = self.reusing = False
        self._inside: dict[int, _Cell] = {}
        self._left_out: list[_Cell] = []

    def install(self, patch: Patch) -> None:
        """Intercept the branches of every block, and the sub-modules that do nothing but feed one of them."""
        cell = fed = _Cell()
        for module, is_branch in parts(self._denoiser):
            if is_branch:
                cell = fed = self._new_cell(self._branches)
                patch.around(module, self._around(cell, fed, _itself), "its output is reused")
            else:
                cell = self._new_cell()
                patch.around(module, self._around(cell, fed, _hollow), "is left out on reused steps")
            self._inside |= {id(part): cell for part in module.modules()}
        patch.foretell(self._denoiser.module, self._will_run)

    def _will_run(self, module: nn.Module) -> bool:
        """What `core.foresight` asks: nothing runs inside a branch whose output is given."""
        return self._inside.get(id(module)) not in self._left_out

    def _new_cell(self, *lists: list[_Cell]) -> _Cell:
        cell = _Cell()
        for cells in (self._cells, *lists):
            cells.append(cell)
        return cell

    def keep(self) -> None:
        """Compute everything and keep the outputs."""
        self.keeping = True

    def reuse(self, value: list[Any]) -> None:
        """Take these outputs, as `kept` returned them."""
        self.reusing = True
        for cell, output in zip(self._cells, value, strict=True):
            cell.output = output
        self._given = [cell for cell in self._branches if cell.output is not None]
        self._left_out = [cell for cell in self._cells if cell.output is not None]

    def ask(self, judge: Judge) -> None:
        """There is no front: blocks are taken apart."""
        raise NotImplementedError("A decision about branches is made before the call.")

    def run(self, call: Callable[..., Any], given: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
        """Make the call."""
        return call(*args, **kwargs)

    def rest(self) -> None:
        """Forget all outputs and leave calls alone."""
        self.keeping = self.reusing = False
        self._given, self._left_out = [], []
        for cell in self._cells:
            cell.output, cell.spoilt = None, False

    @property
    def kept(self) -> list[Any] | None:
        """The outputs, or None when nothing can be reused: a branch ran twice in the call."""
        outputs = [cell.output for cell in self._cells]
        usable = any(cell.output is not None for cell in self._branches)
        return owned(outputs) if usable and not any(cell.spoilt for cell in self._cells) else None

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


def blocks(denoiser: Denoiser) -> Iterator[tuple[Stack, nn.Module]]:
    """Every block of a denoiser with the stack it belongs to."""
    for stack in denoiser.spec.stacks:
        for block in denoiser.stack(stack):
            yield stack, block


def parts(denoiser: Denoiser) -> Iterator[tuple[nn.Module, bool]]:
    """The sub-modules that a `BranchSite` intercepts, in the order of what it keeps.

    With each: is it a branch itself? Otherwise it feeds the branch before it.
    """
    for stack, block in blocks(denoiser):
        for name in stack.branches:
            if (branch := _part(block, name)) is not None:
                yield branch, True
                feeders = (_part(block, feeder) for feeder in stack.feeders.get(name, ()))
                yield from ((feeder, False) for feeder in feeders if feeder is not None)


def place_in_the_middle(denoiser: Denoiser) -> int:
    """The place, in what a `BranchSite` keeps, of the first branch of the middle block: its attention."""
    every = [block for _, block in blocks(denoiser)]
    inside = set(every[(len(every) - 1) // 2].modules())
    return next(place for place, (module, is_branch) in enumerate(parts(denoiser)) if is_branch and module in inside)


def _part(block: nn.Module, path: str) -> nn.Module | None:
    """A sub-module of a block; None where this block goes without it, as the last one of SD3 does."""
    found: Any = block
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Module) else None


def _itself(output: Any) -> Any:
    return output


def _hollow(output: Any) -> Any:
    """Stand-ins of an output that is not needed: the same structure, the last dimension empty."""
    if isinstance(output, tuple):
        return tuple(_hollow(part) for part in output)
    return output.new_empty((*output.shape[:-1], 0))
