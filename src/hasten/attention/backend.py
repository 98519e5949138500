"""Chooses the kernel that computes attention, on every architecture, without process-wide settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from hasten.attention.kernels import KERNELS, AttentionKernel
from hasten.attention.operator import attend, calls
from hasten.core.errors import NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class AttentionBackend(Technique):
    """Sends each attention call of the denoiser to one chosen kernel.

    Works on the call of `scaled_dot_product_attention` inside each attention module, so it reaches U-Nets, SD3,
    DiT and PixArt as well, where diffusers' `set_attention_backend` does nothing, and leaves no process-wide state.
    Calls with a mask that the kernel cannot take raise PyTorch's error rather than switch silently.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    paper: ClassVar[str] = (
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html"
    )

    name: Literal["math", "flash", "efficient", "cudnn"] = field(
        default="flash", metadata=about("the kernel: math, flash, efficient or cudnn", trial="math")
    )

    def claims(self) -> tuple[str, ...]:
        """The attention kernel of the whole denoiser."""
        return ("attention.kernel",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a kernel for this device and type, and known attention modules."""
        if problem := KERNELS[self.name].problem(target.device, target.dtype):
            usable = [n for n, k in KERNELS.items() if k.problem(target.device, target.dtype) is None]
            yield f"{problem}; usable here: {', '.join(usable)}."
        for denoiser in target.denoisers:
            if not denoiser.spec.attention:
                yield f"hasten does not know the attention modules of {denoiser.spec.model_class}."

    def apply(self, target: Target, patch: Patch) -> None:
        """Redirect the attention call inside every attention module."""
        counted = patch.keep(_Counted())
        for denoiser in target.denoisers:
            for _, module in denoiser.of_class(*denoiser.spec.attention):
                link = _redirecting(KERNELS[self.name], counted)
                patch.around(module, link, f"attention is computed by the {self.name} kernel")

    def engaged(self, session: Session) -> Evidence:
        """Attention calls were counted where the kernel is called."""
        counted = session.state(self, _Counted)
        if not counted.total(self.name):
            raise NotEngaged(f"no attention call reached the {self.name} kernel.")
        return Evidence(summary=f"{counted.total(self.name)} attention calls went to the {self.name} kernel")

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Which kernel is fastest depends on shapes and device; memory does not grow."""
        return Cost(basis="measured")


class _Counted:
    """Counts kernel calls: eager ones here, those inside compiled code through the operator's own counter."""

    def __init__(self) -> None:
        self.eager = 0
        self._before = dict(calls)

    def total(self, name: str) -> int:
        return self.eager + calls.get(name, 0) - self._before.get(name, 0)


class _Redirect(TorchFunctionMode):
    """Sends `scaled_dot_product_attention` to a kernel while it is active."""

    def __init__(self, kernel: AttentionKernel, counted: _Counted) -> None:
        super().__init__()
        self._kernel, self._counted = kernel, counted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            # Tensor.unflatten is written in Python with super(), which torch.compile cannot trace under a mode.
            return torch.unflatten(*args, **named) if func is torch.Tensor.unflatten else func(*args, **named)
        call = _arguments(*args, **named)
        if torch.compiler.is_compiling():
            return attend(*call, self._kernel.name)
        self._counted.eager += 1
        return self._kernel.run(*call)


def _arguments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float, bool, float | None, bool]:  # fmt: skip
    return query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa


def _redirecting(kernel: AttentionKernel, counted: _Counted) -> Callable[..., Any]:
    mode = _Redirect(kernel, counted)

    def around(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with mode:
            return call(*args, **kwargs)

    return around
