"""Which blocks of a denoiser are sure to run in the present call: what leaves blocks out tells what brings them in.

Weights that are fetched ahead of a block would be moved in vain if a cache then left the block out. Whoever leaves
blocks out therefore announces what it knows (`Patch.foretell`), and whoever fetches ahead asks `will_run`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

from torch import nn

Foretell = Callable[[nn.Module], "bool | None"]
"""Will this sub-module run in the present call? None while that is not decided yet."""

_ANSWERS: WeakKeyDictionary[nn.Module, list[Foretell]] = WeakKeyDictionary()


def foretell(denoiser: nn.Module, answer: Foretell) -> Callable[[], None]:
    """Let `will_run` ask `answer` about sub-modules of this denoiser; returns what ends that."""
    answers = _ANSWERS.setdefault(denoiser, [])
    answers.append(answer)
    return partial(_end, answers, answer)


def will_run(denoiser: nn.Module, module: nn.Module) -> bool | None:
    """False when anyone says that the sub-module is left out, None when anyone has yet to decide, otherwise True."""
    said = [answer(module) for answer in _ANSWERS.get(denoiser, ())]
    if False in said:
        return False
    return None if None in said else True


def _end(answers: list[Foretell], answer: Foretell) -> None:
    if answer in answers:
        answers.remove(answer)
