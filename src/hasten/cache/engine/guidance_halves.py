"""Guidance in one call: the batch holds a conditional and an unconditional half of the same noisy pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from hasten.cache.engine.change import Reading
from hasten.cache.engine.guidance import CHANGED, CONDITIONAL, UNCONDITIONAL, Choice, Given, GuidanceRunner, Leaves
from hasten.cache.engine.history import History
from hasten.core.clock import Moment

UNSURE = "it was not certain yet that the batch is guided"
SURE_AFTER = 2


class BatchedGuidance(GuidanceRunner):
    """Runs the whole batch, or its conditional half.

    A batch is guided when the noisy pictures of its halves are equal. That is compared at every step and read at the
    next, so nothing waits; after two steps it is certain, for two pictures of one seed have parted by then.
    """

    def forget(self) -> None:
        """Drop all that is remembered."""
        self._kept: dict[str, _Kept] = {}

    def run(self, call: Callable[..., Any], moment: Moment, given: Given, args: Any, kwargs: Any) -> Any:
        """Make the call with the whole batch or half of it."""
        kept = self._kept.setdefault(moment.branch, _Kept(self.history()))
        batch = Batch.of(self.picture(given), first=self.denoiser.spec.conditional == "first")
        changed = kept.history.admit(self.kind(given))
        if changed:
            kept.differ.clear()
        choice, reason = self.choose(moment, kept.history, _obstacle(kept, batch, changed))
        if batch is None:
            kept.differ.clear()
            output = call(*args, **kwargs)
            self.count(moment, moment.branch, full=True, reason=reason)
            return output
        kept.differ = [*kept.differ[1 - SURE_AFTER :], Reading(batch.halves_differ())]
        if choice == "compute":
            return self._whole(call, moment, kept, batch, args, kwargs, reason)
        return self._half(call, moment, kept, batch, args, kwargs, choice)

    def _whole(
        self, call: Callable[..., Any], moment: Moment, kept: _Kept, batch: Batch, args: Any, kwargs: Any, reason: str
    ) -> Any:
        output = call(*args, **kwargs)
        leaves, kept.form = tree_flatten(output)
        self.remember(kept.history, moment, *batch.split(leaves))
        self.count(moment, CONDITIONAL, full=True)
        self.count(moment, UNCONDITIONAL, full=True, reason=reason)
        return output

    def _half(
        self,
        call: Callable[..., Any],
        moment: Moment,
        kept: _Kept,
        batch: Batch,
        args: Any,
        kwargs: Any,
        choice: Choice,
    ) -> Any:
        output = call(*batch.conditional(args), **batch.conditional(kwargs))
        conditional = cast(Leaves, tree_flatten(output)[0])
        unconditional = self.stand_in(choice, kept.history, moment, kwargs, conditional)
        self.count(moment, CONDITIONAL, full=True)
        self.count(moment, UNCONDITIONAL, full=False)
        return tree_unflatten(batch.join(conditional, unconditional), kept.form)


class _Kept:
    """What one call of a step remembers: differences, the form of the output, whether the halves differed."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.differ: list[Reading] = []
        self.form: Any = None


def _obstacle(kept: _Kept, batch: Batch | None, changed: bool) -> str:
    if batch is None:
        return "the batch has no two halves"
    if changed:
        return CHANGED
    if len(kept.differ) < SURE_AFTER:
        return UNSURE
    return "the batch is not guided" if any(reading.value() != 0 for reading in kept.differ) else ""


class Batch:
    """Arguments and outputs of a call whose batch is two halves; `pictures` is one tensor or a list of tensors."""

    def __init__(self, pictures: torch.Tensor | list[torch.Tensor], *, first: bool) -> None:
        """`first`: is the first half the conditional one?"""
        self._pictures, self._first = pictures, first
        self._size, self._listed = len(pictures), not isinstance(pictures, torch.Tensor)

    @classmethod
    def of(cls, pictures: Any, *, first: bool) -> Batch | None:
        """The batch, or None for one that cannot be halved."""
        return None if len(pictures) % 2 or not len(pictures) else cls(pictures, first=first)

    def halves_differ(self) -> torch.Tensor:
        """1 when the pictures of the two halves differ anywhere, otherwise 0; not read from the device."""
        half = self._size // 2
        pairs = list(zip(self._pictures[:half], self._pictures[half:], strict=True))
        if any(one.shape != other.shape for one, other in pairs):
            return torch.ones(())
        return torch.stack([(one != other).any() for one, other in pairs]).any().float()

    def conditional(self, value: Any) -> Any:
        """Arguments of a call with only the conditional half of everything that has the size of the batch."""
        if isinstance(value, torch.Tensor):
            return self._mine(value) if value.dim() and value.shape[0] == self._size else value
        if isinstance(value, Mapping):
            return {key: self.conditional(part) for key, part in cast("Mapping[Any, Any]", value).items()}
        if isinstance(value, list | tuple):
            parts = cast("list[Any]", value)
            if self._listed and len(parts) == self._size:
                return self._mine(parts)
            return type(parts)(self.conditional(part) for part in parts)
        return value

    def split(self, leaves: Leaves) -> tuple[Leaves, Leaves]:
        """Conditional and unconditional half of an output."""
        half = self._size // 2
        if self._listed:
            first, last = leaves[:half], leaves[half:]
        else:
            first, last = [leaf[:half] for leaf in leaves], [leaf[half:] for leaf in leaves]
        return (first, last) if self._first else (last, first)

    def join(self, conditional: Leaves, unconditional: Leaves) -> Leaves:
        """The output of the whole batch; the inverse of `split`."""
        first, last = (conditional, unconditional) if self._first else (unconditional, conditional)
        return [*first, *last] if self._listed else [torch.cat(pair) for pair in zip(first, last, strict=True)]

    def _mine(self, value: Any) -> Any:
        half = self._size // 2
        return value[:half] if self._first else value[half:]
