"""Chooses a kernel by measurement: each usable one is checked and timed on the real call, and the result is kept."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hasten.attention import remembered
from hasten.attention.bias import Bias
from hasten.attention.call import MASK, AttentionCall
from hasten.attention.kernels import HALF, KERNELS, LOSSLESS, LOSSY, AttentionKernel
from hasten.attention.remembered import Choice, Trial
from hasten.attention.rows import reference_error
from hasten.core.diagnosis import in_words
from hasten.core.errors import Refused

_ENOUGH_SECONDS, _MOST_RUNS = 0.05, 20
_MATH_BYTES = 2**28
"""The math kernel holds all scores; it is timed only where they are few."""


@dataclass(frozen=True)
class Candidates:
    """The kernels among which to choose, and how far a result may be from the exact one, relative to its norm."""

    names: tuple[str, ...]
    tolerance: dict[torch.dtype, float]


CHOICES: dict[str, Candidates] = {
    "auto": Candidates(LOSSLESS, {torch.float16: 4e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}),
    "auto_8bit": Candidates(tuple(name for name in LOSSY if KERNELS[name].measured), dict.fromkeys(HALF, 0.15)),
}
"""What may be asked for instead of a kernel, and is then decided by measuring."""
BEST = "best"
"""Asks for the first kernel by speed that serves a call, without measuring."""
_TOLERANCE = 1e-3
_BY_SPEED = ("flash3", "flash4", "cudnn", "flash2", "flash", "xformers", "efficient", "flex", "math")
"""Fast ones first, as measured on an H200."""

_known: dict[tuple[str, AttentionCall], Choice] = {}
"""What this process has chosen; it depends on nothing but device, versions and shapes, so it is shared."""


def chosen(
    asked: str, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None,
    dropout: float, scale: float | None,
) -> Choice:  # fmt: skip
    """The kernel for a call: as chosen before in this process or on this machine, or by measuring now.

    Raises Refused with every candidate's reason when none can serve the call.
    """
    here = (asked, call)
    if settled(asked, call) is None:
        _known[here] = _measured(asked, call, query, key, value, bias, dropout, scale)
    return _known[here]


def served(asked: str, call: AttentionCall) -> bool:
    """Does a kernel, or one of a choice, take this call?"""
    names = CHOICES[asked].names if asked in CHOICES else (asked,)
    return any(KERNELS[name].refuses(call) is None for name in names)


def settled(asked: str, call: AttentionCall) -> str | None:
    """The kernel that serves a call where that needs no measuring: the one asked for, or one chosen before."""
    if asked not in CHOICES:
        return asked
    here = (asked, call)
    if here not in _known and (found := _recalled(asked, call)):
        _known[here] = found
    return _known[here].kernel if here in _known else None


def known(asked: str, call: AttentionCall) -> Choice | None:
    """What was chosen for a call in this process."""
    return _known.get((asked, call))


def forget() -> None:
    """Forget this process's choices, so that the file or a measurement decides again."""
    _known.clear()


def _recalled(asked: str, call: AttentionCall) -> Choice | None:
    found = remembered.recall(asked, call)
    usable = found and found.kernel in CHOICES[asked].names and not KERNELS[found.kernel].refuses(call)
    return found if usable else None


def _measured(
    asked: str, call: AttentionCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None,
    dropout: float, scale: float | None,
) -> Choice:  # fmt: skip
    tolerance = CHOICES[asked].tolerance.get(call.dtype, _TOLERANCE)
    trials: list[Trial] = []
    for entry, obstacle in _candidates(asked, call):
        run = functools.partial(entry, query, key, value, bias, dropout, scale)
        check = functools.partial(reference_error, query, key, value, bias, scale)
        trials.append(obstacle or _tried(entry.name, run, check if not dropout else None, tolerance))
    timed = [trial for trial in trials if trial.milliseconds is not None]
    if timed:
        choice = Choice(min(timed, key=lambda trial: trial.milliseconds or math.inf).kernel, tuple(trials))
        remembered.keep(asked, call, choice)
        return choice
    if asked == "auto" and (spare := _spare(call)):
        return Choice(spare, tuple(trials))
    raise Refused([f"No attention kernel can serve {call.in_words()}.", *(f"{t.problem}." for t in trials)])


def _candidates(asked: str, call: AttentionCall) -> Iterator[tuple[AttentionKernel, Trial | None]]:
    """Each candidate, with the reason where it is not to be run."""
    for name in CHOICES[asked].names:
        entry = KERNELS[name]
        small = 4 * call.batch * call.heads * call.queries * call.keys <= _MATH_BYTES
        if problem := entry.refuses(call):
            yield entry, Trial(name, problem=problem)
        elif not entry.measured and not (name == "math" and small):
            yield entry, Trial(name, problem=f"the {name} kernel is used when it is named or nothing else works")
        elif capturing(call.device):
            yield entry, Trial(name, problem="nothing can be timed while a CUDA graph is recorded")
        else:
            yield entry, None


def _spare(call: AttentionCall) -> str | None:
    """What serves when nothing could be timed; such a choice is not written to the file."""
    return next((name for name in ("flash", "efficient", "math") if not KERNELS[name].refuses(call)), None)


def best(call: AttentionCall) -> str:
    """The first kernel by speed that takes the call as it is, else the first that takes it at all."""
    able = [name for name in _BY_SPEED if not KERNELS[name].refuses(call)]
    direct = [name for name in able if call.bias in ("", MASK) or call.bias in KERNELS[name].native(call.device)]
    if not able:
        reasons = [f"{KERNELS[name].refuses(call)}." for name in _BY_SPEED]
        raise Refused([f"No attention kernel can serve {call.in_words()}.", *reasons])
    return (direct or able)[0]


def _tried(
    name: str, run: Callable[[], torch.Tensor], check: Callable[[torch.Tensor], float] | None, tolerance: float
) -> Trial:
    try:
        with torch.no_grad():
            found = run()
            error = 0.0 if check is None else check(found)
            if not math.isfinite(error):
                return Trial(name, problem="its result holds NaN or infinity")
            if error > tolerance:
                return Trial(name, error=error, problem=f"its error of {error:.2g} is above {tolerance:.2g}")
            return Trial(name, milliseconds=milliseconds(run, found.device), error=error)
    except Exception as problem:  # noqa: BLE001 - a candidate may fail in any way; the choice goes on without it
        return Trial(name, problem=in_words(problem))


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a call in milliseconds, over at most 20 runs and about 50 ms."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < _MOST_RUNS and sum(times) < _ENOUGH_SECONDS * 1000):
        times.append(_once(run, device))
    return statistics.median(times)


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def capturing(device: torch.device) -> bool:
    """Is a CUDA graph being recorded, during which nothing can be waited for?"""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
