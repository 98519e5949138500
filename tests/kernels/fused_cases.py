"""Inputs on which the kernels between products are compared with their references.

Run as a module with TRITON_INTERPRET=1 it makes the comparison in Triton's interpreter, on the CPU, and prints the
largest differences as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from hasten.kernels import gated, residual, rotary
from hasten.kernels.coded import Coding
from hasten.kernels.residual import Added, Norm, Normalizing
from hasten.kernels.rotary import HeadNorm, Heads

Parts = tuple[torch.Tensor, ...]
Case = tuple[str, Parts, Parts]
"""Name, what the kernel gives and what the reference gives."""


def values(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def norms(width: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Normalizing, Added | None, bool]]:
    """Ways to normalize, what is added before, and whether there is a second stream."""

    def some(*shape: int, seed: int = 1) -> torch.Tensor:
        return values(*shape, dtype=dtype, device=device, seed=seed)

    six = some(2, 6 * width)
    shift, scale, gate = six[:, :width], six[:, width : 2 * width], six[:, 2 * width : 3 * width]
    added = Added(some(2, 5, width, seed=3), gate)
    rms = Norm("rms", 1e-5, some(width))
    yield "layer norm", Normalizing(Norm("layer", 1e-6)), None, False
    yield "affine layer norm", Normalizing(Norm("layer", 1e-6, some(width), some(width, seed=2))), None, False
    yield "modulated, joined", Normalizing(Norm("layer", 1e-6), shift, scale), None, True
    yield "added and modulated", Normalizing(Norm("layer", 1e-6), shift, scale), added, False
    by_token = Normalizing(Norm("layer", 1e-6), some(2, 5, width, seed=5), some(2, 1, width, seed=6))
    yield "modulated by token", by_token, Added(some(2, 9, width, seed=4)[:, 4:]), False
    yield "norm after", Normalizing(rms, None, scale), Added(added.value, gate, Norm("rms", 1e-5, some(width))), False
    smooth = some(width, seed=7).abs() + 0.5
    yield "int8", Normalizing(Norm("layer", 1e-6), shift, scale, Coding("int8", smooth, width & -width)), added, False
    yield "float8", Normalizing(rms, None, scale, Coding("float8", None, 4)), None, True


def norm_cases(width: int, dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    from hasten.kernels.triton.tokens import residual_norm

    x, second = (values(2, tokens, width, dtype=dtype, device=device) for tokens in (5, 3))
    for name, how, added, joined in norms(width, dtype, device):
        other = second if joined else None
        yield f"{name} {width}", residual_norm(x, other, added, how), residual.eager(x, other, added, how)
    turned = values(2, width, 5, dtype=dtype, device=device).transpose(1, 2)
    plain = Normalizing(Norm("layer", 1e-6))
    transposed = (turned, None, Added(turned), plain)
    yield f"transposed {width}", residual_norm(*transposed), residual.eager(*transposed)
    gate = values(2, 1, width, dtype=dtype, device=device)
    only = Added(values(2, 5, width, dtype=dtype, device=device, seed=9), gate)
    yield f"only added {width}", residual_norm(x, None, only, None), residual.eager(x, None, only, None)


def activation_cases(width: int, dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    from hasten.kernels.triton.activate import activate

    both = values(2, 5, 2 * width, dtype=dtype, device=device)
    first, second = both[..., :width], both[..., width:]
    for kind in ("gelu", "gelu_tanh", "swiglu"):
        other = second if kind == "swiglu" else None
        for coding in (None, Coding("int8", None, width & -width), Coding("float8", second[0, 0].abs() + 1)):
            label = f"{kind} {coding.kind if coding else 'plain'} {width}"
            yield label, activate(first, kind, other, coding), gated.eager(first, kind, other, coding)


def head_cases(count: int, size: int, dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    from hasten.kernels.triton.heads import prepare_heads

    def stream(tokens: int, weights: int, form: str) -> Heads:
        whole = values(2, tokens, 3 * count * size, dtype=dtype, device=device).split(count * size, -1)
        parts = [part.unflatten(-1, (count, size)) for part in whole]
        weight = values(weights, dtype=dtype, device=device) if weights else None
        angles = values(1, tokens, size // 2, device=device)
        turns = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).unbind(-1)
        repeated = tuple(turn.repeat_interleave(2, -1)[..., ::2] for turn in turns)
        return Heads(*parts, weight, weight, {"": None, "complex": turns, "real": repeated}[form])  # pyright: ignore

    for name, streams, norm in (
        ("joined, real", [stream(3, size, "real"), stream(5, size, "real")], HeadNorm(1e-6)),
        ("complex", [stream(5, size, "complex")], HeadNorm(1e-6)),
        ("across heads", [stream(5, count * size, "complex")], HeadNorm(1e-6, across=True)),
        ("joined only", [stream(5, 0, ""), stream(3, 0, "")], None),
    ):
        yield f"{name} {count}x{size}", prepare_heads(streams, norm), rotary.eager(streams, norm)


def all_cases(dtype: torch.dtype, device: str = "cpu", *, small: bool = True) -> Iterator[Case]:
    for width in (32, 48) if small else (3072, 3840, 1152):
        yield from norm_cases(width, dtype, device)
    for width in (32, 40) if small else (12288, 10240, 4608):
        yield from activation_cases(width, dtype, device)
    for count, size in ((2, 16), (3, 8)) if small else ((24, 128), (16, 72)):
        yield from head_cases(count, size, dtype, device)


def difference(made: Parts, wanted: Parts) -> float:
    """The largest difference; of codes, the share of those that differ by more than the least step."""
    assert [(part.shape, part.dtype) for part in made] == [(part.shape, part.dtype) for part in wanted]
    return max(_difference(one, other) for one, other in zip(made, wanted, strict=True) if one.numel())


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    apart = (one.float() - other.float()).abs()
    if one.dtype in (torch.int8, torch.float8_e4m3fn):
        return (apart > 1 + other.float().abs() / 8 * (one.dtype != torch.int8)).float().mean().item()
    return apart.max().item()


if __name__ == "__main__":
    print(json.dumps({name: difference(made, wanted) for name, made, wanted in all_cases(torch.float32)}))
