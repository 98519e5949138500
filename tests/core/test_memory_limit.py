"""Running out of memory: caught in one place, said in words, and everything given back."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from hasten.core.errors import HastenError
from hasten.core.memory_limit import OutOfMemory, within_memory

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.6 GiB of which 1.2 GiB is free. "
    "Of the allocated memory 20 GiB is allocated by PyTorch. If reserved but unallocated memory is large try ..."
)


def test_the_error_names_what_ran_and_keeps_the_allocators_facts() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError(MESSAGE)

    with pytest.raises(OutOfMemory) as caught:
        within_memory(fails, "CompileBlocks()")
    assert isinstance(caught.value, HastenError)
    text = str(caught.value)
    assert text.startswith("Out of memory with CompileBlocks(): CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert text.endswith("of which 1.2 GiB is free.")
    assert str(caught.value.advised("Try less.")).endswith("is free. Try less.")


def test_what_the_failed_call_held_is_free_again() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def fails() -> None:
        large = torch.zeros(1000)
        kept.append(weakref.ref(large))
        raise torch.OutOfMemoryError(MESSAGE)

    with pytest.raises(OutOfMemory) as caught:
        within_memory(fails, "plain")
    gc.collect()
    assert kept[0]() is None
    assert caught.value.__context__ is None


def test_other_errors_pass_and_results_return() -> None:
    assert within_memory(lambda: 3, "plain") == 3
    with pytest.raises(ZeroDivisionError):
        within_memory(lambda: 1 // 0, "plain")
