"""Guidance in two calls: a conditional and an unconditional one in each step, for the same noisy picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from hasten.cache.engine.guidance import CHANGED, CONDITIONAL, UNCONDITIONAL, Given, GuidanceRunner, Leaves
from hasten.core.clock import Moment


@dataclass
class _Conditional:
    """The latest conditional call: when, of what kind, on which picture, and what came out."""

    step: int
    kind: object
    picture: torch.Tensor
    leaves: Leaves
    form: Any


class SeparateGuidance(GuidanceRunner):
    """Makes the unconditional call, or answers in its place.

    The calls are known by diffusers' `cache_context` ("cond", "uncond") or by their order in the step. A step whose
    conditional call comes second, or was made on another picture, is computed.
    """

    def forget(self) -> None:
        """Drop all that is remembered."""
        self._history, self._latest = self.history(), None

    def run(self, call: Callable[..., Any], moment: Moment, given: Given, args: Any, kwargs: Any) -> Any:
        """Make the conditional call, or the unconditional one, or stand in for it."""
        conditional, unconditional = self._names()
        if moment.branch in conditional:
            return self._conditional(call, moment, given, args, kwargs)
        if moment.branch in unconditional:
            return self._unconditional(call, moment, given, args, kwargs)
        self.count(moment, moment.branch, full=True)
        return call(*args, **kwargs)

    def _names(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Branches of the conditional and of the unconditional call."""
        first, last = "call 1", "call 2"
        if self.denoiser.spec.conditional == "last":
            first, last = last, first
        return (CONDITIONAL, first), (UNCONDITIONAL, last)

    def _conditional(self, call: Callable[..., Any], moment: Moment, given: Given, args: Any, kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        leaves, form = tree_flatten(output)
        # Copies: pipelines may work in place, and replayed CUDA graphs write to the same memory again.
        kept = [leaf.clone() for leaf in leaves]
        self._latest = _Conditional(moment.step, self.kind(given), self.picture(given), kept, form)
        self.count(moment, moment.branch, full=True)
        return output

    def _unconditional(self, call: Callable[..., Any], moment: Moment, given: Given, args: Any, kwargs: Any) -> Any:
        latest, self._latest = self._latest, None
        if latest is not None and not (latest.step == moment.step and _same(latest.picture, self.picture(given))):
            latest = None
        choice, reason = self.choose(moment, self._history, self._obstacle(latest, given))
        if latest is not None and choice != "compute":
            self.count(moment, moment.branch, full=False)
            leaves = self.stand_in(choice, self._history, moment, given, latest.leaves)
            return tree_unflatten(leaves, latest.form)
        output = call(*args, **kwargs)
        if latest is not None:
            self.remember(self._history, moment, latest.leaves, tree_flatten(output)[0])
        self.count(moment, moment.branch, full=True, reason=reason)
        return output

    def _obstacle(self, latest: _Conditional | None, given: Given) -> str:
        if latest is None:
            return "no conditional call on the same picture came before"
        return CHANGED if self._history.admit((latest.kind, self.kind(given))) else ""


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Are these the same numbers in the same memory?"""
    here, there = (one.data_ptr(), one.shape, one.stride()), (other.data_ptr(), other.shape, other.stride())
    return one is other or here == there
