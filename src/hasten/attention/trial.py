"""Tries attention kernels on small calls of every kind they take, in a process of their own (`python -m`)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hasten.attention.bias import Bias, BlockDiagonal, LocalFromBottomRight, LowerTriangular
from hasten.attention.call import AttentionCall
from hasten.attention.choosing import CHOICES, milliseconds
from hasten.attention.kernels import HALF, KERNELS, AttentionKernel
from hasten.attention.kernels.packages import package_obstacle
from hasten.attention.kernels.xformers_operator import XFORMERS, mismatch
from hasten.attention.rows import reference_error
from hasten.core.diagnosis import Finding, Obstacle, in_words
from hasten.core.packages import installed
from hasten.core.trying import report

KIND = "attention kernel"
_EXACT = 1e-3
_LARGE = 12.0
"""Factor on the numbers of the case that overflows where scores are kept in half precision without care."""


@dataclass(frozen=True)
class Case:
    """A call to try: its sizes, what queries see, and how large the numbers are."""

    name: str
    queries: int = 257
    keys: int = 257
    heads: int = 4
    key_heads: int = 4
    size: int = 64
    bias: Bias | None = None
    factor: float = 1.0

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random query, key and value [2, heads, tokens, size], the same at every try."""
        generator = torch.Generator().manual_seed(0)
        made = [(self.heads, self.queries), (self.key_heads, self.keys), (self.key_heads, self.keys)]
        query, key, value = (torch.randn(2, *sizes, self.size, generator=generator).to(device, dtype) for sizes in made)
        return query * self.factor, key * self.factor, value


CASES = (
    Case("self-attention"),
    Case("whole blocks", queries=256, keys=256),
    Case("cross-attention", keys=77),
    Case("head size 40", size=40),
    Case("grouped heads", key_heads=2),
    Case("large numbers", factor=_LARGE),
    Case("mask", bias=torch.linspace(-3, 3, 257)),
    Case("triangle", bias=LowerTriangular()),
    Case("window", bias=LocalFromBottomRight(30, 5)),
    Case("sequences in a row", bias=BlockDiagonal([100, 37, 120])),
)


def examine(name: str, device: torch.device, dtype: torch.dtype) -> Finding:
    """Say whether a kernel is usable: what keeps it away, or how its results compare with math attention."""
    entry = KERNELS[name]
    obstacle = (package_obstacle(name, entry.package) if entry.package else None) or entry.obstacle(device, dtype)
    if obstacle:
        return _finding(name, obstacle.status, _with_cause(entry, obstacle))
    errors: dict[str, float] = {}
    left: list[str] = []
    for case in CASES:
        error = _try(entry, case, device, dtype)
        if error is None:
            left.append(case.name)
        else:
            errors[case.name] = error
    return _judged(entry, dtype, errors, left, device)


def _with_cause(entry: AttentionKernel, obstacle: Obstacle) -> str:
    """On a machine without a GPU xFormers cannot be asked for an operator, but its build record can be read."""
    cause = mismatch() if entry.package is XFORMERS and obstacle.status == "unfit" else ""
    return f"{obstacle.sentence}; {cause}" if cause else obstacle.sentence


def _try(entry: AttentionKernel, case: Case, device: torch.device, dtype: torch.dtype) -> float | None:
    query, key, value = case.tensors(device, dtype)
    bias = case.bias.to(device, dtype) if isinstance(case.bias, torch.Tensor) else case.bias
    if entry.refuses(AttentionCall.of(query, key, value, bias, 0.0)):
        return None
    try:
        found = entry(query, key, value, bias)
    except Exception as error:
        raise RuntimeError(f"{case.name}: {in_words(error)}") from error
    return reference_error(query, key, value, bias, None, found)


def _judged(
    entry: AttentionKernel, dtype: torch.dtype, errors: dict[str, float], left: list[str], device: torch.device
) -> Finding:
    limit = CHOICES["auto_8bit" if entry.lossy else "auto"].tolerance.get(dtype, 0.15 if entry.lossy else _EXACT)
    wrong = [f"{name}: {_fault(error)}" for name, error in errors.items() if not error <= _allowed(name, limit)]
    if wrong:
        return _finding(entry.name, "broken", f"wrong results ({'; '.join(wrong)})")
    worst = max((error for name, error in errors.items() if name != "large numbers"), default=0.0)
    parts = [
        *_version(entry),
        f"{len(errors)} kinds of calls right, error at most {100 * worst:.2g} %",
        *_time(entry, device, dtype),
    ]
    return _finding(entry.name, "usable", "; ".join(parts + ([f"takes no {', '.join(left)}"] if left else [])))


def _allowed(name: str, limit: float) -> float:
    """Large numbers make softmax pick single keys, where rounding decides between equals: only NaN counts there."""
    return 1.0 if name == "large numbers" else limit


def _fault(error: float) -> str:
    return "NaN or infinity" if error != error else f"off by {100 * error:.2g} %"


def _version(entry: AttentionKernel) -> Iterator[str]:
    if entry.package and (found := installed(entry.package.distribution)):
        yield f"{entry.package.distribution} {found}"


def _time(entry: AttentionKernel, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """On a GPU, the time of FLUX's attention at 1024 x 1024."""
    if device.type == "cuda" and entry.measured:
        query, key, value = (part[:1] for part in Case("", 4608, 4608, 24, 24, 128).tensors(device, dtype))
        entry(query, key, value)
        yield f"{milliseconds(lambda: entry(query, key, value), device):.3g} ms for 24 heads x 4608 x 128"


def _finding(name: str, status: str, detail: str) -> Finding:
    return Finding(kind=KIND, name=name, status=status, detail=detail)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    place = torch.device(sys.argv[1])
    usual = HALF[1] if place.type == "cuda" else torch.float32
    with torch.no_grad():
        report(KIND, sys.argv[2:], lambda name: examine(name, place, usual))
