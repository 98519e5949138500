"""xFormers' `memory_efficient_attention`, with its own descriptions of what a query sees."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from hasten.attention.bias import (
    Bias,
    BlockDiagonal,
    Described,
    LocalFromBottomRight,
    LowerTriangular,
    LowerTriangularFromBottomRight,
)
from hasten.attention.kernels.packages import Package, function, load
from hasten.attention.kernels.tools import additive, token_major
from hasten.core.diagnosis import Obstacle, in_words
from hasten.core.packages import installed

XFORMERS = Package(
    "xformers", ("xformers.ops",), "pip install xformers --no-deps", "memory_efficient_attention", "0.0.28"
)
_ALIGNED = 8
"""The kernels read a tensor bias in rows whose length in memory is a multiple of 8."""


def xformers(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Run xFormers' operator; it takes sequences in a row as one sample and key heads as many as query heads."""
    if isinstance(bias, BlockDiagonal):
        many = BlockDiagonal(bias.lengths * len(query), bias.key_lengths * len(query))
        rows = [part.flatten(0, 1)[None] for part in token_major(query, key, value)]
        found = function(XFORMERS)(*rows, attn_bias=described(many), p=dropout, scale=scale)
        return found[0].unflatten(0, (len(query), -1)).transpose(1, 2)
    given = described(bias) if isinstance(bias, Described) else _tensor(bias, query, key)
    parts = token_major(query, key, value)
    return function(XFORMERS)(*parts, attn_bias=given, p=dropout, scale=scale).transpose(1, 2)


def described(bias: Described) -> Any:
    """The same description in xFormers' classes."""
    module: Any = importlib.import_module("xformers.ops.fmha.attn_bias")
    match bias:
        case LowerTriangular():
            return module.LowerTriangularMask()
        case LowerTriangularFromBottomRight():
            return module.LowerTriangularFromBottomRightMask()
        case LocalFromBottomRight():
            return module.LocalAttentionFromBottomRightMask(bias.window_left, bias.window_right)
        case BlockDiagonal():
            return module.BlockDiagonalMask.from_seqlens(list(bias.lengths), list(bias.key_lengths))


def _tensor(bias: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    mask = additive(bias, query, key.shape[2])
    if mask is None:
        return None
    keys = key.shape[2]
    mask = F.pad(mask.expand(*mask.shape[:-1], keys), (0, -keys % _ALIGNED))
    return mask.expand(len(query), query.shape[1], query.shape[2], -1)[..., :keys]


def built_for() -> str:
    """The PyTorch that the installed wheel was built for, as its build record says; empty when it does not say."""
    try:
        found = importlib.util.find_spec("xformers")
        places = list(found.submodule_search_locations or ()) if found else []
        record = json.loads((Path(places[0]) / "cpp_lib.json").read_text("utf-8"))
        return str(cast("dict[str, Any]", record)["version"]["torch"])
    except (OSError, ValueError, IndexError, KeyError, TypeError, ImportError):
        return ""


@functools.cache
def no_operator(device: torch.device, dtype: torch.dtype) -> Obstacle | None:
    """Ask xFormers for an operator for small tensors of this type, without running one."""
    if device.type != "cuda":
        return None
    try:
        load(XFORMERS)
        fmha: Any = importlib.import_module("xformers.ops.fmha")
        part = torch.zeros(1, 8, 1, 64, device=device, dtype=dtype)
        fmha.dispatch._dispatch_fw(fmha.common.Inputs(part, part, part), False)
    except Exception as error:  # noqa: BLE001 - a foreign package may raise anything
        return Obstacle("broken", f"{mismatch() or 'xFormers finds no operator'}: {_first_line(error)}")
    return None


def mismatch() -> str:
    """Say that the wheel was built for another PyTorch, or nothing."""
    built, here = built_for(), torch.__version__
    if not built or built == here:
        return ""
    return f"xformers {installed('xformers')} is built for torch {built}, and here is torch {here}"


def _first_line(error: Exception) -> str:
    return (
        in_words(type(error)(str(error).partition("\n")[0].removesuffix(" with inputs:")))
        if str(error)
        else in_words(error)
    )
