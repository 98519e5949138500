"""Errors that tell a user what is wrong, where, and which valid choice lies nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class HastenError(Exception):
    """Base of every error a user can cause; its text is one plain sentence or a short list of them."""


class UnknownName(HastenError):
    """A name that exists nowhere: says what kind of thing it should be and suggests neighbours."""

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        self.kind, self.name, self.choices = kind, name, sorted(choices)
        super().__init__(f"There is no {kind} called {name!r}. {nearest(name, self.choices)}")


class RecipeSyntaxError(HastenError):
    """A recipe text that cannot be read; carries the place (1-based line and column)."""

    def __init__(self, problem: str, source: str, line: int, column: int) -> None:
        self.line, self.column = line, column
        super().__init__(f"{source}, line {line}, column {column}: {problem}")


class InvalidSetting(HastenError):
    """A technique's parameter with a wrong type or an absurd value."""


class Refused(HastenError):
    """A recipe that cannot run on this target; `reasons` holds one sentence per obstacle."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__(" ".join(self.reasons) if len(self.reasons) == 1 else _listed(self.reasons))


class NoEffect(HastenError):
    """A technique was applied and changed nothing."""


class NotEngaged(HastenError):
    """A technique was applied, the pipeline ran, and the technique did not take part."""


class PatchError(HastenError):
    """A change to the pipeline that cannot be made, or no longer be taken back, safely."""


class BrokenOutput(HastenError):
    """The pipeline produced something that is no picture, such as NaN."""


def nearest(name: str, choices: Sequence[str], shown: int = 12) -> str:
    """Return a sentence that names the likeliest meant choices, or all of them when they are few."""
    folded = {choice.casefold(): choice for choice in choices}
    close = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.6)]
    if close:
        return f"Did you mean {' or '.join(close)}?"
    if not choices:
        return "None is available."
    more = f", ... ({len(choices)} in all)" if len(choices) > shown else ""
    return f"Available: {', '.join(choices[:shown])}{more}."


def _listed(reasons: Sequence[str]) -> str:
    return "This recipe cannot run here:\n" + "\n".join(f"  - {reason}" for reason in reasons)
