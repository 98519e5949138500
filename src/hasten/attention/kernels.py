"""The attention kernels that PyTorch brings along, as functions with one signature, and where each can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float, bool, float | None, bool], torch.Tensor
]
"""(query, key, value [batch, heads, tokens, head size], mask, dropout, causal, scale, grouped heads) -> like query."""


@dataclass(frozen=True)
class AttentionKernel:
    """One way to compute attention."""

    name: str
    about: str
    run: Kernel
    devices: tuple[str, ...]
    """Device types it runs on."""
    half_on_gpu: bool = False
    """On a GPU, does it need float16 or bfloat16?"""
    masks: bool = True
    """Does it take an additive or boolean mask?"""

    def problem(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Say why it cannot run here, or return None."""
        if device.type not in (*self.devices, "meta"):
            return f"the {self.name} kernel runs on {' and '.join(self.devices)}, not on {device.type}"
        if self.half_on_gpu and device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16):
            return f"the {self.name} kernel needs float16 or bfloat16 on a GPU, not {str(dtype).removeprefix('torch.')}"
        if self.name == "cudnn" and device.type == "cuda" and not torch.backends.cudnn.is_available():
            return "this build of PyTorch has no cuDNN"
        return None


def _sdpa(*backends: SDPBackend) -> Kernel:
    choices = list(backends)

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
        dropout: float, causal: bool, scale: float | None, grouped: bool,
    ) -> torch.Tensor:  # fmt: skip
        with sdpa_kernel(choices):
            return F.scaled_dot_product_attention(
                query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped
            )

    return run


KERNELS: dict[str, AttentionKernel] = {
    kernel.name: kernel
    for kernel in (
        AttentionKernel(
            "math", "plain matrix products; the reference", _sdpa(SDPBackend.MATH), ("cpu", "cuda", "mps", "xpu")
        ),
        AttentionKernel(
            "flash", "FlashAttention as built into PyTorch (CPU: its blocked CPU kernel)",
            _sdpa(SDPBackend.FLASH_ATTENTION), ("cpu", "cuda", "xpu"), half_on_gpu=True, masks=False,
        ),
        AttentionKernel(
            "efficient", "memory-efficient attention (the xFormers kernel built into PyTorch)",
            _sdpa(SDPBackend.EFFICIENT_ATTENTION), ("cuda",),
        ),
        AttentionKernel(
            "cudnn", "cuDNN's fused attention", _sdpa(SDPBackend.CUDNN_ATTENTION), ("cuda",), half_on_gpu=True
        ),
    )
}  # fmt: skip
