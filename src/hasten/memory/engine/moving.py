"""Sets up what moves a pipeline's components: on which device they run, where they are at home, and who counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn

from hasten.core.errors import InvalidSetting, NotEngaged, nearest
from hasten.core.patch import Patch
from hasten.core.target import Target
from hasten.core.technique import Evidence
from hasten.memory.engine.components import Component, Turns, say_where
from hasten.memory.engine.copies import copies_to
from hasten.memory.engine.residency import Ledger
from hasten.memory.engine.sizes import in_words, parse_bytes
from hasten.memory.engine.storage import Storage, folder_problem, half_of_memory
from hasten.memory.engine.units import Kind, cut
from hasten.memory.engine.weights import all_tensors, size_of


@dataclass(frozen=True)
class Movement:
    """How weights come and go."""

    kind: Kind
    device: torch.device
    group: int = 1
    ahead: int = 0
    pinned: int = 0
    """Page-locked host memory to take at most, in bytes."""
    folder: Path | None = None


@dataclass
class Moved:
    """The run-time state of a session whose weights move."""

    turns: Turns
    ledger: Ledger
    storage: Storage
    device: torch.device

    def evidence(self) -> Evidence:
        """What has really been moved."""
        ledger = self.ledger
        if not ledger.loads:
            raise NotEngaged("no weights were brought in.")
        words = (
            f"{in_words(ledger.moved)} brought to {self.device} in {ledger.loads} loads ({ledger.ahead} ahead of use, "
            f"{in_words(ledger.in_vain)} in vain); at most {in_words(ledger.most)} of {in_words(ledger.managed)} of "
            f"weights were there at one time"
        )
        for size, where in ((self.storage.pinned, "page-locked"), (self.storage.on_disk, "on disk")):
            words += f"; {in_words(size)} {where}" if size else ""
        return Evidence(summary=words)


def set_up(target: Target, names: Iterable[str], movement: Movement, patch: Patch) -> Moved:
    """Send the components home and intercept their calls."""
    chosen, ledger = tuple(names), Ledger()
    copies, denoisers = copies_to(movement.device), {denoiser.name for denoiser in target.denoisers}
    components = [
        Component(cut(target, name, movement.kind, movement.group), name in denoisers, copies, ledger, movement.ahead)
        for name in chosen
    ]
    # What moves most gets the page-locked memory.
    components.sort(key=lambda component: not component.denoises)
    storage = Storage(movement.pinned if movement.device.type == "cuda" else 0, movement.folder)
    moved = patch.keep(Moved(Turns(components), ledger, storage, movement.device))
    patch.undo(target.modules[chosen[0]], "weights are kept at home between uses", moved_back(moved))
    for component in components:
        storage.store(component.cut.units)
        ledger.managed += sum(unit.bytes for unit in component.cut.units)
    say_where(target, chosen, movement.device, patch)
    moved.turns.install(patch)
    return moved


class moved_back:  # noqa: N801 - a function with state that a failed undo can call again
    """Takes everything off the device and gives it back to its first places."""

    def __init__(self, moved: Moved) -> None:
        self._moved = moved

    def __call__(self) -> None:
        """Safe to call again after a failure."""
        self._moved.turns.leave()
        self._moved.storage.close()


def execution_device(device: str, target: Target) -> torch.device:
    """Where components run: as asked for; with `auto` where the denoiser is, or on the first GPU."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError:
            raise InvalidSetting(f"{device!r} is no device; write auto, cuda, cuda:1 or cpu.") from None
    if target.device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return target.device


def chosen_components(target: Target, patterns: Iterable[str]) -> list[str]:
    """Names of the components with weights that match one of the patterns."""
    return [
        name
        for name, module in target.modules.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns) and all_tensors(module)
    ]


def pinned_bytes(text: str) -> int:
    """Read a budget of page-locked memory; `auto` is half of this machine's memory."""
    return half_of_memory() if text == "auto" else parse_bytes(text)


def movement_problems(target: Target, patterns: Iterable[str], device: str, folder: str = "") -> Iterator[str]:
    """Say what keeps components from being moved."""
    place, names = execution_device(device, target), chosen_components(target, patterns)
    if not names:
        yield f"no component is called {' or '.join(map(repr, patterns))}. {nearest('', list(target.modules))}"
    if place.type == "cpu" and device == "auto":
        yield "there is no GPU that weights could be brought to; device='cpu' rehearses it in host memory."
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        yield f"there is no device {place} on this machine."
    for name in names:
        yield from _immovable(name, target.modules[name])
    if target.device.type != "meta":
        yield from _left_behind(target, names, place)
    if folder and (problem := folder_problem(folder, sum(size_of(target.modules[name]) for name in names))):
        yield problem


def _immovable(name: str, module: nn.Module) -> Iterator[str]:
    yield from special_weights(name, all_tensors(module))
    if any(getattr(part, "_hf_hook", None) is not None for part in module.modules()):
        yield f"the {name} is already moved by accelerate or diffusers; take that off first (remove_all_hooks)."


def special_weights(name: str, tensors: Iterable[torch.Tensor]) -> Iterator[str]:
    """Complain about weights that hold more than plain data, such as the packed tensors of some quantizers."""
    if kinds := {type(tensor.data).__name__ for tensor in tensors} - {"Tensor"}:
        yield f"weights of the {name} are of type {' and '.join(sorted(kinds))}, which cannot be moved in place."


def _left_behind(target: Target, names: list[str], place: torch.device) -> Iterator[str]:
    for name, module in target.modules.items():
        if name not in names:
            elsewhere = {str(tensor.device) for tensor in all_tensors(module) if tensor.device.type != place.type}
            if elsewhere:
                yield f"the {name} is on {elsewhere.pop()} and would stay there; move it to {place}, or name it too."
