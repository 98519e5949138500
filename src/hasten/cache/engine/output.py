"""Reuse of the whole output of a denoiser: on a reused step the network is not called at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hasten.cache.engine.site import Judge
from hasten.core.patch import Patch


class OutputSite:
    """The denoiser's output, whatever its form (tuple, output class, list of pictures); see `engine.site.Site`."""

    afresh: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._value: list[Any] | None = None
        self._kept: list[Any] | None = None
        self._keeping = self._served = False
        self._form: Any = None

    @property
    def kept(self) -> list[Any] | None:
        """The leaves of the latest computed output."""
        return self._kept

    @property
    def served(self) -> bool:
        """Was the network left out?"""
        return self._served

    def install(self, patch: Patch) -> None:
        """Nothing beside the denoiser's call, which the runner intercepts."""

    def keep(self) -> None:
        """Keep the output."""
        self._keeping = True

    def reuse(self, value: list[Any]) -> None:
        """Hand out these leaves in the form of the latest output."""
        self._value = value

    def ask(self, judge: Judge) -> None:
        """There is no front: the network runs, or it does not."""
        raise NotImplementedError("A decision about the whole output is made before the call.")

    def run(self, call: Callable[..., Any], given: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
        """Call the network, or return the value; the caller gets copies of what is kept."""
        if self._value is not None and self._form is not None:
            self._served = True
            return tree_unflatten(list(tree_map(_own, self._value)), self._form)
        output = call(*args, **kwargs)
        if self._keeping:
            leaves, self._form = tree_flatten(output)
            self._kept = [_own(leaf) for leaf in leaves]
        return output

    def rest(self) -> None:
        """Forget everything but the form of outputs."""
        self._value = self._kept = None
        self._keeping = self._served = False


def _own(leaf: Any) -> Any:
    """A copy: pipelines may work in place, and replayed CUDA graphs write to the same memory again."""
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
