"""Runs a function in a forked copy of this process: whatever a peer patches goes with it, and a crash is only a row."""

from __future__ import annotations

import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

# Counting GPUs through CUDA in the parent would keep every forked child from using them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


class RowFailed(Exception):
    """Why a row has no result, in one sentence."""


def isolated(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result (plain JSON values), computed in a child process; raises RowFailed if it fails."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        outcome = json.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        raise RowFailed(f"The process ended without a result (exit code {process.exitcode}).") from None
    finally:
        process.join()
    if "error" in outcome:
        raise RowFailed(outcome["error"])
    return outcome["result"]


def spread(function: Callable[[Any], Tensor], items: Sequence[Any], jobs: int) -> list[Tensor]:
    """The function's tensor for each item, computed by forked copies of this process side by side."""
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=None) as pool:
        found = pool.map(partial(_as_array, function), items, chunksize=1)
    return [torch.from_numpy(array) for array in found]


def _as_array(function: Callable[[Any], Tensor], item: Any) -> Any:
    return function(item).numpy()


def _answer(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        outcome = {"result": function(*args)}
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way; the row says how
        traceback.print_exc()
        outcome = {"error": sentence(error)}
    sender.send_bytes(json.dumps(outcome).encode())


def sentence(error: BaseException) -> str:
    """Kind and first line of an error, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {text}"[:300]
