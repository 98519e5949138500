"""The one place where running out of memory is caught, so that everything else sees an error in words."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from hasten.core.errors import HastenError

R = TypeVar("R")


class OutOfMemory(HastenError):
    """The device has too little memory for what was tried; `advice` says what to try next, once that is known."""

    def __init__(self, what: str, details: str, advice: str = "") -> None:
        self.what, self.details, self.advice = what, details, advice
        super().__init__(f"Out of memory with {what}: {details}{f' {advice}' if advice else ''}")

    def advised(self, advice: str) -> OutOfMemory:
        """The same error with advice."""
        return OutOfMemory(self.what, self.details, advice)


def within_memory(work: Callable[[], R], what: str) -> R:
    """Do `work`; raises OutOfMemory naming `what` where PyTorch's allocator gives up, with all memory given back.

    `what` must undo itself on an exception, as a session does.
    """
    try:
        return work()
    except torch.OutOfMemoryError as error:
        details = _first_sentences(error)
        # Frames of the failed call would keep its tensors alive, and with them the memory that the next try needs.
        traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(what, details)


def _first_sentences(error: BaseException) -> str:
    """The allocator's message without its hints on fragmentation."""
    text = " ".join(str(error).split())
    kept = text.partition(" Of the allocated memory")[0].partition(" If reserved")[0]
    return kept if kept.endswith(".") else f"{kept}."
