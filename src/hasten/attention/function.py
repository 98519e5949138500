"""Attention for people who write their own models, in the layout of xFormers."""

from __future__ import annotations

import torch

from hasten.attention.bias import Bias, check_sizes
from hasten.attention.choosing import BEST
from hasten.attention.kernels import KERNELS
from hasten.attention.operator import attention
from hasten.core.errors import HastenError, UnknownName


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Bias | None = None, dropout: float = 0.0,
    scale: float | None = None, backend: str | None = None,
) -> torch.Tensor:  # fmt: skip
    """Scaled dot-product attention with a description of what each query sees.

    `q` is [batch, queries, heads, size]; `k` and `v` are [batch, keys, heads, size], where fewer heads are shared
    evenly by those of `q`. The result is [batch, queries, heads, size of v]. `bias` is None, a description from this
    package (`LowerTriangular()`, `BlockDiagonal([5, 3])`, ...), which becomes a matrix only where the kernel cannot
    do without, or a tensor that broadcasts to [batch, heads, queries, keys]: boolean (true = seen) or added to the
    scores. Queries that a description lets see nothing give zeros. `scale` is 1 / sqrt(size) unless given.

    `backend` names a kernel, or is "auto" (choose by measuring); without it the fastest kind is taken that serves
    the call, those that take the description as it is before those that need a matrix. Gradients flow where the
    kernel computes them, but not through torch.compile. Raises Refused when the kernel cannot serve the call.
    """
    check_layout(q, k, v)
    check_sizes(bias, q.shape[1], k.shape[1])
    if not 0 <= dropout < 1:
        raise HastenError(f"attend(dropout={dropout!r}): must be at least 0 and less than 1.")
    if backend is not None and backend not in KERNELS and backend != "auto":
        raise UnknownName("attention kernel", backend, [*KERNELS, "auto"])
    near, far, values = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return attention(near, far, values, bias, dropout, scale, backend or BEST).transpose(1, 2)


def check_layout(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise HastenError unless the tensors are [batch, tokens, heads, size] and fit together."""
    shapes = ", ".join(f"{name} {list(part.shape)}" for name, part in (("q", q), ("k", k), ("v", v)))
    if not q.dim() == k.dim() == v.dim() == 4:
        raise HastenError(f"attend takes tensors [batch, tokens, heads, head size], not {shapes}.")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise HastenError(f"attend: q and k need one batch and head size, k and v as many tokens and heads: {shapes}.")
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        places = ", ".join(f"{p.dtype} on {p.device}".removeprefix("torch.") for p in (q, k, v))
        raise HastenError(f"attend: q, k and v must have one type and be on one device: {places}.")
