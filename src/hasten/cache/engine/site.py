"""A site: a place in a denoiser whose work can be left out when its result is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from hasten.core.patch import Patch

Value = Any
"""What a site keeps and takes: any nesting of tensors. Two values of one site have the same structure."""

Judge = Callable[[torch.Tensor, torch.Tensor | None], Value | None]
"""Asked in the middle of a call with the picture's stream at the end of the front and, where it is comparable, at
its beginning; answers with the value to reuse, or None to compute."""


class Site(Protocol):
    """Does nothing until `keep`, `reuse` or `ask` says what the next call is; `rest` must follow that call."""

    afresh: tuple[str, ...]
    """Patterns of the names of arguments that act afresh on a reused step, so that they may come, go and change."""

    @property
    def kept(self) -> Value | None:
        """What the latest call has kept; None when it kept nothing that can be reused."""
        ...

    @property
    def served(self) -> bool:
        """Did the latest call really use a value it was given?"""
        ...

    def install(self, patch: Patch) -> None:
        """Intercept what the site needs, through `patch`."""

    def keep(self) -> None:
        """Let the next call compute everything and keep what could be reused later."""

    def reuse(self, value: Value) -> None:
        """Let the next call use `value` in place of the work."""

    def ask(self, judge: Judge) -> None:
        """Let the next call ask when its front has been computed; sites without a front raise."""

    def run(self, call: Callable[..., Any], given: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
        """Make the denoiser call; `given` holds the arguments by name."""

    def rest(self) -> None:
        """Forget everything and leave calls alone."""
