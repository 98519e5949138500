"""Activations that were rounded to 8 bits by what computed them, and the product that takes them so.

One pass less over the activations than where the product rounds its own input; see `kernels.residual` and
`kernels.gated`, which put such activations out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from hasten.kernels import gpu
from hasten.kernels.activations import float8_tokens, int8_tokens
from hasten.kernels.call import Product
from hasten.kernels.hadamard import rotate
from hasten.kernels.weight import TENSORS, QuantizedWeight

Kind = Literal["int8", "float8"]
DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "float8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Coding:
    """How activations are rounded for a product, token by token."""

    kind: Kind
    smooth: torch.Tensor | None = None
    """[channels]: divided by first."""
    rotation: int = 1
    """Channels that a Hadamard matrix rotates together after that; 1 for none."""


@dataclass(frozen=True)
class Coded:
    """Rounded activations. They stand for codes * scales, which were smoothed and rotated as the coding says."""

    codes: torch.Tensor
    """[..., channels] int8 or float8_e4m3fn."""
    scales: torch.Tensor
    """[..., 1] float32."""
    dtype: torch.dtype
    """The type of what was rounded, and of products with it."""

    def values(self) -> torch.Tensor:
        """What they stand for, float32."""
        return self.codes.float() * self.scales


def code(values: torch.Tensor, coding: Coding, dtype: torch.dtype) -> Coded:
    """Round activations, [..., channels] float32; `dtype` is the type that products with them have."""
    inner = values if coding.smooth is None else values / coding.smooth.to(values.dtype)
    inner = inner if coding.rotation == 1 else rotate(inner, coding.rotation)
    flat = inner.reshape(-1, inner.shape[-1])
    codes, scales = int8_tokens(flat) if coding.kind == "int8" else float8_tokens(flat)
    return Coded(codes.reshape(inner.shape), scales.reshape(*inner.shape[:-1], 1), dtype)


def reference(
    codes: torch.Tensor, scales: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Codes [tokens, inputs] and scales [tokens, 1] times the weight's values, in float32."""
    matrix = weight.dequantize().reshape(weight.shape[0], -1)
    return F.linear(codes.float() * scales, matrix, None if bias is None else bias.float()).to(dtype)


def gains(kind: Kind, device: torch.device) -> bool:
    """Is there a kernel for codes of this kind on the device with which rounding beforehand saves a pass?"""
    return gpu.usable(device) and (kind == "int8" or gpu.has_float8(device))


def _by_kernel(
    codes: torch.Tensor, scales: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    if not codes.is_cuda:
        return None
    # Stands for what was rounded, which nobody reads any more.
    x = torch.empty((1, 1), dtype=dtype, device=codes.device).expand(codes.shape)
    kind = "int8" if codes.dtype == torch.int8 else "float8"
    return gpu.multiply_codes(Product(x, weight, bias, kind), codes.contiguous(), scales.flatten())


@torch.library.custom_op("hasten::coded_linear", mutates_args=())
def _operator(
    codes: torch.Tensor, scales: torch.Tensor, tensors: list[torch.Tensor | None],
    bias: torch.Tensor | None, shape: list[int], number: str, columns: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    named = {name: tensor for name, tensor in zip(TENSORS, tensors, strict=True) if tensor is not None}
    weight = QuantizedWeight.of(shape, number, columns, named)
    found = _by_kernel(codes, scales, weight, bias, dtype)
    return reference(codes, scales, weight, bias, dtype) if found is None else found


@_operator.register_fake
def _fake(
    codes: torch.Tensor, scales: torch.Tensor, tensors: list[torch.Tensor | None],
    bias: torch.Tensor | None, shape: list[int], number: str, columns: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return codes.new_empty(codes.shape[0], shape[0], dtype=dtype)


def coded_linear(given: Coded, weight: QuantizedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """given @ weight.T + bias: [..., inputs] to [..., outputs] in the type that `given` names; no gradients."""
    named = weight.tensors()
    return operate(given, [named.get(n) for n in TENSORS], bias, weight.shape, weight.number.name, weight.columns)


def operate(
    given: Coded,
    tensors: list[torch.Tensor | None],
    bias: torch.Tensor | None,
    shape: tuple[int, ...],
    number: str,
    columns: int,
) -> torch.Tensor:
    """The same with the weight in the parts that `TENSORS` names; a single node in compiled graphs."""
    tokens = given.codes.reshape(-1, given.codes.shape[-1])
    found = _operator(tokens, given.scales.reshape(-1, 1), tensors, bias, list(shape), number, columns, given.dtype)
    return found.reshape(*given.codes.shape[:-1], shape[0])
