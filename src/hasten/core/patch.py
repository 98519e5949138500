"""The ledger of changes to a pipeline: every verb records what it did and takes itself back, newest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from hasten.core.errors import PatchError
from hasten.core.foresight import Foretell, foretell
from hasten.core.intercept import Interceptor, intercept

if TYPE_CHECKING:
    from hasten.core.clock import Clock

_ABSENT = object()
T = TypeVar("T")


@dataclass(frozen=True)
class Change:
    """One recorded change: where in the pipeline, and what was done there."""

    where: str
    what: str


class Patch:
    """Changes one technique makes to one target; `close()` undoes them in reverse order.

    `names` maps `id(object)` to its path, so that the log reads in the model's own terms. Only instances are
    changed: never a class, a module global or an environment variable.
    """

    def __init__(self, names: dict[int, str], clock: Callable[[], Clock]) -> None:
        self.log: list[Change] = []
        self.states: list[object] = []
        self._names, self._clock = names, clock
        self._undo: list[Callable[[], object]] = []

    @property
    def clock(self) -> Clock:
        """The session's clock, installed on first use."""
        return self._clock()

    def around(
        self, obj: object, link: Interceptor, what: str, *, method: str = "__call__", innermost: bool = False
    ) -> None:
        """Put `link(call, *args, **kwargs)` around a method of this one object; see `core.intercept`.

        With `innermost=True` it stays inside all others, and so runs only when the method itself does.
        """
        self._undo.append(intercept(obj, method, link, innermost=innermost))
        self._record(obj, what)

    def outermost(self, obj: object, link: Interceptor, what: str, *, method: str = "__call__") -> None:
        """Like `around`, but stays outside every other interceptor of that method."""
        self._undo.append(intercept(obj, method, link, outermost=True))
        self._record(obj, what)

    def set(self, obj: object, name: str, value: Any, what: str) -> None:
        """Set an attribute; an attribute the instance did not have itself is deleted again."""
        before = obj.__dict__.get(name, _ABSENT)
        setattr(obj, name, value)
        self._undo.append(partial(_restore, obj, name, before))
        self._record(obj, what)

    def swap(self, parent: nn.Module, name: str, module: nn.Module, what: str) -> None:
        """Replace a direct sub-module; the original is kept alive and comes back.

        It comes back inside an adapter (PEFT) that was put around the replacement meanwhile.
        """
        if name not in parent._modules:
            raise PatchError(f"{type(parent).__name__} has no sub-module {name!r} to replace.")
        before = parent._modules[name]
        parent._modules[name] = module
        self._undo.append(partial(_put_back, parent, name, module, before))
        self._record(parent, f"{name}: {what}")

    def add(self, parent: nn.Module, name: str, module: nn.Module, what: str) -> None:
        """Give a module a sub-module under a new name, as the last one."""
        if hasattr(parent, name):
            raise PatchError(f"{type(parent).__name__} has {name!r} already.")
        parent.add_module(name, module)
        self._undo.append(partial(parent._modules.pop, name))
        self._record(parent, f"{name}: {what}")

    def restride(self, module: nn.Module, memory_format: torch.memory_format, what: str) -> int:
        """Lay out the 4-D parameters of `module` in `memory_format`, values untouched; return how many changed."""
        changed = 0
        for parameter in module.parameters():
            if parameter.dim() == 4 and not parameter.is_contiguous(memory_format=memory_format):
                strides = parameter.stride()
                parameter.data = parameter.data.contiguous(memory_format=memory_format)
                self._undo.append(partial(_restore_strides, parameter, strides))
                changed += 1
        if changed:
            self._record(module, f"{what} ({changed} weights)")
        return changed

    def hold(self, weight: torch.Tensor, data: torch.Tensor, what: str, *, owner: object) -> None:
        """Let a parameter or buffer of `owner` hold other data; the tensor object stays, its own data come back."""
        self._undo.append(partial(setattr, weight, "data", weight.data))
        weight.data = data
        self._record(owner, what)

    def foretell(self, denoiser: nn.Module, answer: Foretell) -> None:
        """Let `core.foresight.will_run` ask `answer` about blocks of a denoiser; no change, so nothing is logged."""
        self._undo.append(foretell(denoiser, answer))

    def undo(self, obj: object, what: str, callback: Callable[[], object]) -> None:
        """Record a change that has just been made by other means, with the function that takes it back."""
        self._undo.append(callback)
        self._record(obj, what)

    def keep(self, state: T) -> T:
        """Remember run-time state for `session.state(technique, type)`; returns it."""
        self.states.append(state)
        return state

    def close(self) -> None:
        """Take everything back, newest change first; a failing undo does not stop the others.

        The first failure is raised at the end; what failed is tried again by the next `close`.
        """
        failed: list[tuple[Callable[[], object], Exception]] = []
        while self._undo:
            undo = self._undo.pop()
            try:
                undo()
            except Exception as error:  # noqa: BLE001 - collected, so that the others are still undone
                failed.append((undo, error))
        self._undo = [undo for undo, _ in reversed(failed)]
        if failed:
            raise failed[0][1]

    def absorb(self) -> None:
        """Forget how to undo: the changes become permanent."""
        self._undo.clear()

    def _record(self, obj: object, what: str) -> None:
        self.log.append(Change(self._names.get(id(obj), type(obj).__name__), what))


def summarize(changes: Iterable[Change]) -> list[str]:
    """Group changes into one line each: equal changes in one component are counted, not repeated."""
    grouped: Counter[tuple[str, str]] = Counter()
    places: dict[tuple[str, str], str] = {}
    for change in changes:
        key = (change.where.partition(".")[0], change.what)
        grouped[key] += 1
        places.setdefault(key, change.where)
    return [
        f"{places[key]}: {key[1]}" if count == 1 else f"{key[0]}: {key[1]} ({count} places, first {places[key]})"
        for key, count in grouped.items()
    ]


def _restore(obj: object, name: str, before: object) -> None:
    if before is not _ABSENT:
        setattr(obj, name, before)
    elif name in obj.__dict__:
        delattr(obj, name)


def _put_back(parent: nn.Module, name: str, module: nn.Module, before: nn.Module | None) -> None:
    holder, key = parent, name
    while (current := holder._modules[key]) is not module and current is not None and "base_layer" in current._modules:
        holder, key = current, "base_layer"
    found = holder._modules[key] is module
    (holder if found else parent)._modules[key if found else name] = before


def _restore_strides(parameter: nn.Parameter, strides: tuple[int, ...]) -> None:
    original = torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)
    parameter.data = original.copy_(parameter.data)
