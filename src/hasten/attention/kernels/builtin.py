"""The attention kernels that PyTorch brings along.

For what `scaled_dot_product_attention` has no words (windows, triangles from the bottom right, sequences in a row),
the flash and efficient kernels are called through the operators that it uses itself.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.attention.bias import (
    Bias,
    BlockDiagonal,
    LocalFromBottomRight,
    LowerTriangular,
    LowerTriangularFromBottomRight,
    materialize,
)
from hasten.attention.kernels.reduction import Run
from hasten.attention.kernels.tools import from_a_row, in_a_row, offsets, padded, token_major
from hasten.core.diagnosis import Obstacle
from hasten.core.errors import Refused

_FROM_BOTTOM_RIGHT = 2
"""Mask type of the efficient kernel: a triangle that ends in the last query and key."""


def sdpa(backend: SDPBackend) -> Run:
    """`scaled_dot_product_attention` with one back-end allowed and no other."""
    choices = [backend]

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
        scale: float | None,
    ) -> torch.Tensor:  # fmt: skip
        causal = isinstance(bias, LowerTriangular)
        mask = None if causal else _mask(bias, query, key)
        with sdpa_kernel(choices):
            given: tuple[Any, ...] = (query, key, value, mask, dropout, causal)
            try:
                return F.scaled_dot_product_attention(*given, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
            except RuntimeError as error:
                if "No available kernel" not in str(error):
                    raise
                raise Refused((_why(backend, given, scale),)) from error

    return run


def _mask(bias: Bias | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    if bias is None or isinstance(bias, torch.Tensor):
        return bias
    return materialize(bias, query.shape[2], key.shape[2], query.device)


def _why(backend: SDPBackend, given: tuple[Any, ...], scale: float | None) -> str:
    """PyTorch says its reasons as warnings while it fails, so it fails once more while they are caught."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(RuntimeError):
            F.scaled_dot_product_attention(*given, scale=scale, enable_gqa=given[0].shape[1] != given[1].shape[1])
    said = " ".join(str(one.message).partition(" (Triggered")[0] for one in caught)
    shapes = ", ".join("x".join(map(str, part.shape)) for part in given[:3])
    return f"PyTorch's {backend.name} kernel does not take attention on {shapes}. {said}".strip()


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """FlashAttention as built into PyTorch; on the CPU its blocked kernel, which takes masks instead."""
    described = (LocalFromBottomRight, LowerTriangularFromBottomRight, BlockDiagonal)
    if query.device.type == "cuda" and isinstance(bias, described):
        return padded(_flash_operator, 8)(query, key, value, bias, dropout, scale)
    return sdpa(SDPBackend.FLASH_ATTENTION)(query, key, value, bias, dropout, scale)


def _flash_operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    operator: Any = torch.ops.aten._flash_attention_forward
    causal = isinstance(bias, LowerTriangularFromBottomRight)
    if isinstance(bias, BlockDiagonal):
        return from_a_row(operator(*in_a_row(query, key, value), *_rows(bias, query), dropout, False, False,
                                   scale=scale)[0], len(query))  # fmt: skip
    window: dict[str, int] = {}
    if isinstance(bias, LocalFromBottomRight):
        window = {"window_size_left": bias.window_left, "window_size_right": bias.window_right}
    sizes = (None, None, query.shape[2], key.shape[2])
    found = operator(*token_major(query, key, value), *sizes, dropout, causal, False, scale=scale, **window)
    return found[0].transpose(1, 2)


def _rows(bias: BlockDiagonal, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    starts = (offsets(sizes, len(query), query.device) for sizes in (bias.lengths, bias.key_lengths))
    return (*starts, max(bias.lengths), max(bias.key_lengths))  # pyright: ignore[reportReturnType]


def efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Memory-efficient attention, the xFormers kernel built into PyTorch."""
    backwards_only = isinstance(bias, LocalFromBottomRight) and bias.window_right == 0
    if backwards_only or isinstance(bias, LowerTriangularFromBottomRight | BlockDiagonal):
        return padded(_efficient_operator, 8)(query, key, value, bias, dropout, scale)
    return sdpa(SDPBackend.EFFICIENT_ATTENTION)(query, key, value, bias, dropout, scale)


def _efficient_operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    operator: Any = torch.ops.aten._efficient_attention_forward
    trained = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    if isinstance(bias, BlockDiagonal):
        rows = [part[None] for part in in_a_row(query, key, value)]
        return from_a_row(operator(*rows, None, *_rows(bias, query), dropout, 0, trained, scale=scale)[0][0],
                          len(query))  # fmt: skip
    window = {"window_size": bias.window_left + 1} if isinstance(bias, LocalFromBottomRight) else {}
    rest = (None, None, None, None, None, dropout, _FROM_BOTTOM_RIGHT, trained)
    return operator(*token_major(query, key, value), *rest, scale=scale, **window)[0].transpose(1, 2)


def no_cudnn(device: torch.device, dtype: torch.dtype) -> Obstacle | None:
    """Does this build of PyTorch have cuDNN?"""
    if device.type == "cuda" and not torch.backends.cudnn.is_available():
        return Obstacle("unfit", "this build of PyTorch has no cuDNN")
    return None
