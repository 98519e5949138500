"""Which module of a pipeline is on which device: read from a map, or spread over devices by size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hasten.core.away import taken_away
from hasten.core.errors import nearest
from hasten.core.target import Target
from hasten.memory.engine.balance import How, spread
from hasten.memory.engine.places import canonical
from hasten.memory.engine.units import block_lists
from hasten.memory.engine.weights import all_tensors, own_tensors

_RANGE = re.compile(r"(\d+)-(\d+)")
LONGEST = 10_000
"""Longest range; no model has as many blocks."""
_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True, eq=False)
class Placed:
    """A module whose weights, but for those of modules inside it that are placed themselves, are on one device."""

    name: str
    module: nn.Module
    place: str
    tensors: tuple[torch.Tensor, ...]
    above: str
    """The device that what calls it runs on; for a component, its own."""

    @property
    def is_component(self) -> bool:
        """Is it a whole component of the pipeline?"""
        return "." not in self.name

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class Tree:
    """The modules of a pipeline by path. Of a single model, paths may leave out the model's own name."""

    def __init__(self, target: Target) -> None:
        self.roots = {name: module for name, module in target.modules.items() if all_tensors(module)}
        self._only = next(iter(self.roots)) if target.pipeline is None and len(self.roots) == 1 else ""
        self._target = target

    def find(self, name: str) -> tuple[str, nn.Module] | str:
        """Full path and module, or a sentence that names the nearest valid choice."""
        first = name.partition(".")[0]
        path = f"{self._only}.{name}" if self._only and first != self._only else name
        root, *segments = path.split(".")
        if root not in self.roots:
            return f"there is no component {root!r}. {nearest(root, list(self.roots))}"
        module, walked = self.roots[root], root
        for segment in segments:
            children = dict(module.named_children())
            if segment not in children:
                return f"there is no {segment!r} in {walked}. {_neighbours(segment, walked, children)}"
            module, walked = children[segment], f"{walked}.{segment}"
        return walked, module

    def expand(self, name: str) -> list[str]:
        """The names that a name with ranges stands for; a name that exists as it is stands for itself."""
        if not isinstance(self.find(name), str):
            return [name]
        names = [""]
        for segment in name.split("."):
            names = [f"{head}.{tail}" if head else tail for tail in _numbers(segment) for head in names]
        return names

    def pieces(self) -> Iterator[tuple[str, nn.Module]]:
        """The components and the blocks of denoisers and text encoders, in the order in which they run."""
        stages = {id(d.module): d.spec.unet for d in self._target.denoisers}
        ranks = {name: _rank(self._target, name) for name in self.roots}
        for root in sorted(self.roots, key=lambda name: ranks[name]):
            module = self.roots[root]
            yield root, module
            if module is self._target.vae:
                continue
            blocks = {path: list(members.named_children()) for path, members in block_lists(module)}
            if (unet := stages.get(id(module))) is not None:
                middle = getattr(module, unet.mid, None)
                last = blocks.pop(unet.up, [])
                blocks |= {"": [(unet.mid, middle)] if isinstance(middle, nn.Module) else [], unet.up: last}
            for path, members in blocks.items():
                for name, block in members:
                    yield ".".join(filter(None, (root, path, name))), block


def _numbers(segment: str) -> list[str]:
    match = _RANGE.fullmatch(segment)
    first, last = (int(match[1]), int(match[2])) if match else (0, -1)
    return [str(number) for number in range(first, last + 1)] if 0 <= last - first < LONGEST else [segment]


def _rank(target: Target, name: str) -> int:
    """Text encoders come first, then denoisers, then the VAE."""
    if target.modules[name] is target.vae:
        return 2
    return 1 if any(denoiser.name == name for denoiser in target.denoisers) else 0


def _neighbours(segment: str, walked: str, children: Mapping[str, nn.Module]) -> str:
    if segment.isdigit() and children and all(map(str.isdigit, children)):
        return f"{walked} has 0 to {len(children) - 1}."
    return nearest(segment, list(children))


def read_map(tree: Tree, pairs: Sequence[tuple[str, str]]) -> tuple[list[Placed], list[str]]:
    """Place modules as a map says; returns them with sentences about what is wrong with the map."""
    problems: list[str] = []
    named: dict[str, tuple[nn.Module, str, str]] = {}
    for written, place in pairs:
        for name in tree.roots if written == "*" else tree.expand(written):
            found = tree.find(name)
            if isinstance(found, str):
                problems.append(found)
                break
            path, module = found
            if path in named and written != "*" != named[path][2]:
                problems.append(f"{path} is named twice, by {named[path][2]!r} and {written!r}; keep one of them.")
                break
            if path not in named or named[path][2] == "*":
                named[path] = (module, canonical(place), written)
    chosen = {path: (module, place) for path, (module, place, _) in named.items()}
    placed = settle(tree, chosen)
    return placed, problems or [*missing(tree, placed), *shared(placed)]


def automatic(tree: Tree, memory: Mapping[str, int], how: How) -> list[Placed]:
    """Spread components and blocks over devices; raises TooLarge."""
    pieces = dict(tree.pieces())
    first = next(iter(memory))
    sizes = [piece.bytes for piece in settle(tree, {name: (module, first) for name, module in pieces.items()})]
    places = spread(sizes, memory, how)
    return settle(tree, {name: (m, place) for (name, m), place in zip(pieces.items(), places, strict=True)})


def settle(tree: Tree, chosen: Mapping[str, tuple[nn.Module, str]]) -> list[Placed]:
    """Give every weight to the module placed most closely around it, in the order of `chosen`."""
    found = _without_lists(chosen)
    away = {id(tensor) for root in tree.roots.values() for tensor in taken_away(root)}
    taken = dict[int, torch.Tensor]()
    placed: dict[str, Placed] = {}
    for path in sorted(found, key=lambda path: -path.count(".")):
        module, place = found[path]
        inside = {id(found[other][0]) for other in found if other.startswith(f"{path}.")}
        tensors = [t for t in _outside(module, inside) if id(t) not in taken and id(t) not in away]
        taken |= {id(tensor): tensor for tensor in tensors}
        above = next((found[head][1] for head in _heads(path) if head in found), place)
        placed[path] = Placed(path, module, place, tuple(tensors), above)
    return [placed[path] for path in found]


def _without_lists(chosen: Mapping[str, tuple[nn.Module, str]]) -> dict[str, tuple[nn.Module, str]]:
    """A list of modules is never called itself: its members are placed in its stead."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, (module, place) in chosen.items():
        if isinstance(module, _LISTS):
            members = {f"{path}.{name}": (member, place) for name, member in module.named_children()}
            found |= {name: one for name, one in _without_lists(members).items() if name not in chosen}
        else:
            found[path] = (module, place)
    return found


def _outside(module: nn.Module, inside: set[int]) -> Iterator[torch.Tensor]:
    """The weights of a module without those of some modules inside it."""
    yield from own_tensors(module)
    for child in module.children():
        if id(child) not in inside:
            yield from _outside(child, inside)


def _heads(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def missing(tree: Tree, placed: Iterable[Placed]) -> Iterator[str]:
    """Say which weights a map says nothing about."""
    known = {id(tensor) for piece in placed for tensor in piece.tensors}
    for root, module in tree.roots.items():
        known |= {id(tensor) for tensor in taken_away(module)}
        bare = [path for path, part in module.named_modules() if any(id(t) not in known for t in own_tensors(part))]
        if len(bare) == sum(bool(own_tensors(part)) for part in module.modules()):
            yield f"the map says nothing about the {root}; add {root}=cpu or another device."
        elif bare:
            more = f" and {len(bare) - 1} more" if len(bare) > 1 else ""
            yield f"the map says nothing about {root}.{bare[0]}{more}; {root}=cpu would be the device of the rest."


def shared(placed: Iterable[Placed]) -> Iterator[str]:
    """Say which weights belong to modules that are placed on different devices."""
    pieces = list(placed)
    homes = {id(tensor): piece for piece in pieces for tensor in piece.tensors}
    for piece in pieces:
        inside = {id(other.module) for other in pieces if other.name.startswith(f"{piece.name}.")}
        for tensor in _outside(piece.module, inside):
            home = homes.get(id(tensor), piece)
            if home.place != piece.place:
                yield f"{home.name} and {piece.name} share weights, so they must be on one device."
                break


def as_dictionary(placed: Iterable[Placed]) -> dict[str, str]:
    """The placement in the form of a map: what is on the device of its surroundings is left out, ranges are joined."""
    found: dict[str, str] = {}
    run: tuple[str, int, int, str] | None = None
    for piece in (piece for piece in placed if piece.is_component or piece.place != piece.above):
        head, _, tail = piece.name.rpartition(".")
        if run and tail.isdigit() and (head, int(tail), piece.place) == (run[0], run[2] + 1, run[3]):
            found.pop(_ranged(run))
            run = (*run[:2], int(tail), piece.place)
        else:
            run = (head, int(tail), int(tail), piece.place) if tail.isdigit() else None
        found[_ranged(run) if run else piece.name] = piece.place
    return found


def _ranged(run: tuple[str, int, int, str]) -> str:
    head, first, last, _ = run
    return f"{head}.{first}" if first == last else f"{head}.{first}-{last}"
