"""Cuts a network into units: whole, by groups of blocks, or by every module that holds weights itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import nn

from hasten.core.away import taken_away
from hasten.core.target import Target
from hasten.memory.engine.weights import Unit, all_tensors, own_tensors

Kind = Literal["model", "blocks", "leaf"]


class Cut:
    """A network in units: those `passing` come and go within a call, `rest` stays for the whole call."""

    def __init__(
        self, name: str, module: nn.Module, kind: Kind, *, group: int = 1, stages: tuple[str, ...] = ()
    ) -> None:
        self.name, self.module = name, module
        lists = list(block_lists(module, stages))
        self._taken: dict[int, Unit] = {}
        self._elsewhere = {id(tensor) for tensor in taken_away(module)}
        self.passing: list[Unit] = []
        if kind == "blocks":
            self._by_groups(lists, group)
        elif kind == "leaf":
            self._by_owners()
        self.rest = self._unit(name, all_tensors(module), [module])
        self.rest.lasting = True

    @property
    def units(self) -> list[Unit]:
        """All units that hold anything; those that come and go within a call first."""
        return [unit for unit in (*self.passing, self.rest) if unit.weights]

    def of(self, tensors: Iterable[torch.Tensor]) -> list[Unit]:
        """The units that these parameters and buffers belong to; a shared one may belong elsewhere."""
        return list({id(unit): unit for t in tensors if (unit := self._taken.get(id(t))) is not None}.values())

    def owners(self) -> Iterator[tuple[nn.Module, list[Unit]]]:
        """Every module below the root that holds weights itself, with their units."""
        for module in self.module.modules():
            if module is not self.module and (units := self.of(own_tensors(module))):
                yield module, units

    def pieces(self) -> Iterator[tuple[nn.Module, list[Unit]]]:
        """Every module below the root that may be run, or compiled, as a piece, with the passing units inside it.

        These are the members of all module lists, and the root's own children.
        """
        lists = [part for part in self.module.modules() if isinstance(part, nn.ModuleList)]
        members = [member for part in lists for _, member in part.named_children()]
        for module in {id(m): m for m in (*members, *self.module.children())}.values():
            inside = set(module.modules())
            if units := [unit for unit in self.passing if inside.intersection(unit.modules)]:
                yield module, units

    def _by_groups(self, lists: list[tuple[str, nn.ModuleList]], group: int) -> None:
        for path, members in lists:
            named = list(_named(path, members))
            for start in range(0, len(named), group):
                chosen = named[start : start + group]
                tensors = [tensor for _, block in chosen for tensor in all_tensors(block)]
                self._pass(f"{self.name}.{chosen[0][0]}", tensors, [block for _, block in chosen])

    def _by_owners(self) -> None:
        whole = [module for module in self.module.modules() if isinstance(module, nn.MultiheadAttention)]
        for path, module in self.module.named_modules():
            if module is not self.module:
                # Its fused code reads the weights of its sub-modules without calling them.
                tensors = all_tensors(module) if module in whole else own_tensors(module)
                self._pass(f"{self.name}.{path}", tensors, [module])

    def _pass(self, name: str, tensors: Iterable[torch.Tensor], modules: list[nn.Module]) -> None:
        unit = self._unit(name, tensors, modules)
        if unit.weights:
            self.passing.append(unit)

    def _unit(self, name: str, tensors: Iterable[torch.Tensor], modules: list[nn.Module]) -> Unit:
        free = {id(t): t for t in tensors if id(t) not in self._taken and id(t) not in self._elsewhere}
        unit = Unit(name, free.values(), modules)
        self._taken |= dict.fromkeys(free, unit)
        return unit


def block_lists(module: nn.Module, stages: tuple[str, ...] = ()) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost module lists; in place of those that hold a U-Net's stages the lists inside each stage."""
    for path, members in _outermost_lists(module, ""):
        if path in stages:
            for name, stage in _named(path, members):
                yield from _outermost_lists(stage, f"{name}.")
        else:
            yield path, members


def _outermost_lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield f"{prefix}{name}", child
        else:
            yield from _outermost_lists(child, f"{prefix}{name}.")


def _named(path: str, members: nn.ModuleList) -> Iterator[tuple[str, nn.Module]]:
    """The members by path; some lists of diffusers hold None in places."""
    for index, member in members.named_children():
        yield f"{path}.{index}", member


def cut(target: Target, name: str, kind: Kind, group: int) -> Cut:
    """Cut one component of a pipeline; a VAE is only ever cut by modules, as its weights are few."""
    module = target.modules[name]
    chosen: Kind = "model" if kind == "blocks" and module is target.vae else kind
    unet = next((d.spec.unet for d in target.denoisers if d.module is module), None)
    return Cut(name, module, chosen, group=group, stages=() if unet is None else (unet.down, unet.up))
