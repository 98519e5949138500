"""The product of activations with a quantized weight: one operator, behind which kernels are chosen.

Each kernel says which weights, activations and devices it can do; the first that can is taken, and the reference, which
can do all, comes last. Within what 8-bit rounding leaves open all give the same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hasten.kernels.activations import Activations, rounded
from hasten.kernels.weight import TENSORS, QuantizedWeight


@dataclass(frozen=True)
class Kernel:
    """A way to compute the product."""

    name: str
    takes: Callable[[torch.Tensor, QuantizedWeight, Activations], bool]
    """Can it do this input, [tokens, inputs], this weight and this rounding of activations?"""
    run: Callable[[torch.Tensor, QuantizedWeight, torch.Tensor | None, Activations, torch.Tensor | None], torch.Tensor]
    """Input [tokens, inputs], weight, bias, rounding of activations and their fixed scale to [tokens, outputs]."""


def reference(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None,
    activations: Activations,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    """Dequantize, round the activations, multiply in float32 (or in the input's type, if they are not rounded)."""
    values = rounded(x, activations, input_scale)
    matrix = weight.dequantize(values.dtype).reshape(weight.shape[0], -1)
    found = F.linear(values, matrix, None if bias is None else bias.to(values.dtype))
    return found.to(x.dtype)


REFERENCE = Kernel("reference", lambda *_: True, reference)


def kernels() -> list[Kernel]:
    """All kernels in order of preference."""
    return [REFERENCE]


def choose(x: torch.Tensor, weight: QuantizedWeight, activations: Activations) -> Kernel:
    """The kernel that computes this product."""
    return next(kernel for kernel in kernels() if kernel.takes(x, weight, activations))


def _weight_of(shape: list[int], number: str, columns: int, tensors: list[torch.Tensor | None]) -> QuantizedWeight:
    named = {name: tensor for name, tensor in zip(TENSORS, tensors, strict=True) if tensor is not None}
    return QuantizedWeight.of(shape, number, columns, named)


@torch.library.custom_op("hasten::quantized_linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    scale_coarse: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    scale_offset: torch.Tensor | None,
    minimum: torch.Tensor | None,
    minimum_coarse: torch.Tensor | None,
    minimum_table: torch.Tensor | None,
    minimum_offset: torch.Tensor | None,
    zero: torch.Tensor | None,
    table: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    shape: list[int],
    number: str,
    columns: int,
    activations: str,
) -> torch.Tensor:
    tensors = [codes, scale, scale_coarse, scale_table, scale_offset, minimum, minimum_coarse, minimum_table]
    weight = _weight_of(shape, number, columns, [*tensors, minimum_offset, zero, table])
    kernel = choose(x, weight, activations)  # pyright: ignore
    return kernel.run(x, weight, bias, activations, input_scale)  # pyright: ignore


@_operator.register_fake
def _fake(x: torch.Tensor, *rest: object) -> torch.Tensor:
    shape = rest[13]
    return x.new_empty(x.shape[0], shape[0])  # pyright: ignore


def _remember(ctx, inputs, output) -> None:  # noqa: ANN001 # pyright: ignore
    ctx.save_for_backward(*inputs[1:12])  # pyright: ignore
    ctx.rest = inputs[14:17]  # pyright: ignore
    ctx.inner = inputs[0].dtype  # pyright: ignore


def _gradient(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN001 # pyright: ignore
    """The weight is constant, and rounding of activations passes gradients through."""
    weight = _weight_of(*ctx.rest, list(ctx.saved_tensors))  # pyright: ignore
    matrix = weight.dequantize(grad.dtype).reshape(weight.shape[0], -1)
    bias = grad.sum(0) if ctx.needs_input_grad[12] else None  # pyright: ignore
    return (grad @ matrix, *[None] * 11, bias, *[None] * 5)


_operator.register_autograd(_gradient, setup_context=_remember)


def quantized_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    activations: Activations = "none",
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias for x [..., inputs]; passes gradients to x and bias."""
    tensors = weight.tensors()
    facts = (weight.shape, weight.number.name, weight.columns, activations)
    return operate(x, [tensors.get(name) for name in TENSORS], bias, input_scale, *facts)


def operate(
    x: torch.Tensor,
    tensors: list[torch.Tensor | None],
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    shape: tuple[int, ...],
    number: str,
    columns: int,
    activations: str,
) -> torch.Tensor:
    """The same with the weight in the parts that `TENSORS` names; a single node in compiled graphs."""
    flat = x.reshape(-1, x.shape[-1])
    found = _operator(flat, *tensors, bias, input_scale, list(shape), number, columns, activations)  # pyright: ignore
    return found.reshape(*x.shape[:-1], shape[0])
