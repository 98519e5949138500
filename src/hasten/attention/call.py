"""What a kernel is chosen by: the sizes of an attention call and what is asked of it, without its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.attention.bias import Bias

MASK = "mask"
"""Kind of bias of a call whose bias is a tensor."""


@dataclass(frozen=True)
class AttentionCall:
    """An attention call without its numbers; two equal calls are served by the same kernels."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_size: int
    value_size: int
    bias: str = ""
    """Empty, "mask" for a tensor, or the name of the description."""
    dropout: bool = False
    gradients: bool = False

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float
    ) -> AttentionCall:
        """Describe a call on tensors [batch, heads, tokens, head size]."""
        batch, heads, queries, size = query.shape
        wanted = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        kind = "" if bias is None else MASK if isinstance(bias, torch.Tensor) else type(bias).__name__
        sizes = (batch, heads, key.shape[1], queries, key.shape[2], size, value.shape[3])
        return cls(query.device, query.dtype, *sizes, kind, dropout > 0, wanted)

    @property
    def shapes(self) -> str:
        """Sizes in a form that is also a stable key: `bfloat16 1x24x4608x128`, and the keys where they differ."""
        text = f"{str(self.dtype).removeprefix('torch.')} {self.batch}x{self.heads}x{self.queries}x{self.head_size}"
        if (self.key_heads, self.keys, self.value_size) != (self.heads, self.queries, self.head_size):
            text += f" on {self.key_heads}x{self.keys}x{self.value_size}"
        extras = [self.bias, "dropout" if self.dropout else "", "gradients" if self.gradients else ""]
        return " ".join([text, *filter(None, extras)])

    def in_words(self) -> str:
        """For reports: `self-attention of 4608 tokens, 24 heads x 128`."""
        what = f"{self.queries} tokens" if self.queries == self.keys else f"{self.queries} tokens to {self.keys}"
        extra = {"": "", MASK: ", with a mask"}.get(self.bias, f", {self.bias}")
        return f"{what}, {self.heads} heads x {self.head_size}{extra}"
