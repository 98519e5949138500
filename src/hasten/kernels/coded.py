"""Activations that were rounded to 8 bits by what computed them, and the product that takes them so.

One pass less over the activations than where the product rounds its own input; see `kernels.residual` and
`kernels.gated`, which put such activations out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from hasten.kernels.activations import float8_tokens, int8_tokens
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


@dataclass(frozen=True)
class CodedKernel:
    """A way to multiply codes with codes."""

    name: str
    takes: Callable[[torch.Tensor, QuantizedWeight], bool]
    """Can it do these codes, [tokens, inputs], and this weight?"""
    run: Callable[[torch.Tensor, torch.Tensor, QuantizedWeight, torch.Tensor | None, torch.dtype], torch.Tensor]
    """Codes, scales [tokens, 1], weight, bias and the result's type to [tokens, outputs]."""


def _reference(
    codes: torch.Tensor, scales: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    matrix = weight.dequantize().reshape(weight.shape[0], -1)
    return F.linear(codes.float() * scales, matrix, None if bias is None else bias.float()).to(dtype)


def _by_row(weight: QuantizedWeight) -> bool:
    """Is the weight nothing but codes with one scale for each output, [outputs, inputs]?"""
    whole = weight.columns == weight.codes.shape[-1] and weight.codes.shape[0] == weight.shape[0]
    return whole and set(weight.tensors()) == {"codes", "scale"} and weight.groups == 1


def _even(codes: torch.Tensor, weight: QuantizedWeight) -> bool:
    return codes.is_cuda and codes.shape[1] % 16 == 0 and weight.shape[0] % 16 == 0 and _by_row(weight)


def _takes_float8(codes: torch.Tensor, weight: QuantizedWeight) -> bool:
    kinds = {codes.dtype, weight.codes.dtype}
    return kinds == {torch.float8_e4m3fn} and _even(codes, weight) and torch.cuda.get_device_capability() >= (8, 9)


def _float8(
    codes: torch.Tensor, scales: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """cuBLAS. Scales by row need bfloat16 results; other types are made of those."""
    columns = weight.scale.codes.float().reshape(-1, 1).expand(weight.shape[0], 1).t().contiguous()
    worked = bias if bias is None else bias.to(torch.bfloat16)
    found = torch._scaled_mm(
        codes, weight.codes.t(), scale_a=scales, scale_b=columns, bias=worked, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    return found.to(dtype)


def _takes_int8(codes: torch.Tensor, weight: QuantizedWeight) -> bool:
    return {codes.dtype, weight.codes.dtype} == {torch.int8} and _even(codes, weight) and codes.shape[0] > 16


def _int8(
    codes: torch.Tensor, scales: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    sums = torch._int_mm(codes, weight.codes.t())
    found = sums.float() * scales * weight.scale.codes.float().reshape(1, -1)
    return (found if bias is None else found + bias.float()).to(dtype)


def coded_kernels() -> list[CodedKernel]:
    """All kernels in order of preference; the reference can do all."""
    return [
        CodedKernel("cublas float8", _takes_float8, _float8),
        CodedKernel("cublas int8", _takes_int8, _int8),
        CodedKernel("reference", lambda *_: True, _reference),
    ]


def gains(kind: Kind, device: torch.device) -> bool:
    """Is there a kernel for codes of this kind on the device with which rounding beforehand saves a pass?"""
    return kind == "float8" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@torch.library.custom_op("hasten::coded_linear", mutates_args=())
def _operator(
    codes: torch.Tensor, scales: torch.Tensor, tensors: list[torch.Tensor | None],
    bias: torch.Tensor | None, shape: list[int], number: str, columns: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    named = {name: tensor for name, tensor in zip(TENSORS, tensors, strict=True) if tensor is not None}
    weight = QuantizedWeight.of(shape, number, columns, named)
    kernel = next(kernel for kernel in coded_kernels() if kernel.takes(codes, weight))
    return kernel.run(codes, scales, weight, bias, dtype)


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
