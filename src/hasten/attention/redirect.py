"""Sends the attention calls of a model's attention modules to a kernel, and counts them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from hasten.attention.bias import Bias, LowerTriangular
from hasten.attention.call import AttentionCall
from hasten.attention.operator import SERVE_ALL, Calls, attention, calls
from hasten.core.errors import Refused
from hasten.core.patch import Patch
from hasten.core.target import Target


class Counted:
    """Counts kernel calls: eager ones here, those inside compiled code through the operator's own counter."""

    def __init__(self) -> None:
        self.eager: Calls = Counter()
        self._before = calls.copy()

    def of(self, asked: str) -> Counter[AttentionCall]:
        """How often each kind of call was asked of a kernel."""
        return Counter({call: n for (name, call), n in (self.eager + (calls - self._before)).items() if name == asked})


def redirect(target: Target, patch: Patch, asked: str, what: str, least: int = SERVE_ALL) -> Counted:
    """Put the kernel, or choice, `asked` in place of `scaled_dot_product_attention` in every attention module.

    With `least`, calls with fewer keys and those that the kernel does not take stay as they are.
    """
    counted = patch.keep(Counted())
    for denoiser in target.denoisers:
        for _, module in denoiser.of_class(*denoiser.spec.attention):
            patch.around(module, _redirecting(asked, counted, least), what)
    return counted


class _Redirect(TorchFunctionMode):
    """Sends `scaled_dot_product_attention` to a kernel while it is active."""

    def __init__(self, asked: str, counted: Counted, least: int) -> None:
        super().__init__()
        self._asked, self._counted, self._least = asked, counted, least

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            # Tensor.unflatten is written in Python with super(), which torch.compile cannot trace under a mode.
            return torch.unflatten(*args, **named) if func is torch.Tensor.unflatten else func(*args, **named)
        return self._redirected(args, named)

    def _redirected(self, args: Any, named: Any) -> Any:
        query, key, value, bias, dropout, scale = _arguments(*args, **named)
        shape = query.shape
        parts = (query, key, value)
        if query.dim() != 4:
            parts = tuple(part.reshape(-1, *part.shape[-3:]) for part in parts)
            bias = bias.reshape(-1, *bias.shape[-3:]) if isinstance(bias, torch.Tensor) and bias.dim() > 4 else bias
        found = attention(*parts, bias, dropout, scale, self._asked, self._least, self._counted.eager)  # pyright: ignore
        return found if query.dim() == 4 else found.reshape(*shape[:-1], value.shape[-1])


def _arguments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Bias | None, float, float | None]:  # fmt: skip
    if is_causal and attn_mask is not None:
        raise Refused(("attention with a mask and a triangle at once is asked for; PyTorch has none either.",))
    return query, key, value, LowerTriangular() if is_causal else attn_mask, dropout_p, scale


def _redirecting(asked: str, counted: Counted, least: int) -> Callable[..., Any]:
    mode = _Redirect(asked, counted, least)

    def around(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with mode:
            return call(*args, **kwargs)

    return around
