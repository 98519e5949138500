"""The product of activations with a quantized weight: one operator, behind which kernels are chosen.

Each kernel says which weights, activations and devices it can do; the first that can is taken, and the reference, which
can do all, comes last. Within what 8-bit rounding leaves open all give the same result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch.nn import functional as F

from hasten.kernels import cpu, gpu, tuning
from hasten.kernels.activations import Activations, rounded
from hasten.kernels.call import Kernel, Product
from hasten.kernels.hadamard import rotate
from hasten.kernels.serving import operator
from hasten.kernels.weight import TENSORS, QuantizedWeight


def reference(product: Product) -> torch.Tensor:
    """Dequantize, round the activations, multiply in float32 (or in the input's type, if they are not rounded)."""
    values = rounded(product.prepared(), product.activations, product.input_scale)
    matrix = product.weight.dequantize(values.dtype).reshape(product.weight.shape[0], -1)
    bias = None if product.bias is None else product.bias.to(values.dtype)
    return product.with_side(F.linear(values, matrix, bias).to(product.x.dtype))


REFERENCE = Kernel("reference", lambda product: True, reference)


def kernels(device: torch.device) -> list[Kernel]:
    """All kernels for a device in order of preference."""
    if device.type == "cpu":
        return [*cpu.KERNELS, REFERENCE]
    return [*gpu.kernels(), REFERENCE] if gpu.usable(device) else [REFERENCE]


def choose(product: Product) -> Kernel:
    """The kernel that computes a product."""
    if not product.x.numel():
        return REFERENCE
    able = [kernel for kernel in kernels(product.x.device) if kernel.takes(product)]
    fastest = tuning.known(product)
    found = next((kernel for kernel in able if kernel.name == fastest), None)
    return found or next(kernel for kernel in able if kernel.suits(product))


_counts: list[Counter[str]] = []


@contextmanager
def counted() -> Generator[Counter[str]]:
    """Count, while the block runs, how often each kernel is used, by name."""
    counter: Counter[str] = Counter()
    _counts.append(counter)
    try:
        yield counter
    finally:
        # By identity: counters with the same counts are equal.
        _counts[:] = [other for other in _counts if other is not counter]


def _weight_of(shape: list[int], number: str, columns: int, tensors: list[torch.Tensor | None]) -> QuantizedWeight:
    named = {name: tensor for name, tensor in zip(TENSORS, tensors, strict=True) if tensor is not None}
    return QuantizedWeight.of(shape, number, columns, named)


def _compute(
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
    smooth: torch.Tensor | None,
    down: torch.Tensor | None,
    up: torch.Tensor | None,
    rank_scale: torch.Tensor | None,
    shape: list[int],
    number: str,
    columns: int,
    activations: str,
    rotation: int,
) -> torch.Tensor:
    tensors = [codes, scale, scale_coarse, scale_table, scale_offset, minimum, minimum_coarse, minimum_table]
    weight = _weight_of(shape, number, columns, [*tensors, minimum_offset, zero, table])
    rounding = cast(Activations, activations)
    product = Product(x, weight, bias, rounding, input_scale, smooth, rotation, down, up, rank_scale)
    kernel = choose(product)
    for counter in _counts:
        counter[kernel.name] += 1
    # Triton launches on the current device, which need not be that of the input; on a CPU nothing happens.
    with torch.cuda.device_of(x):
        return kernel.run(product)


_operator = torch.library.custom_op("hasten::quantized_linear", _compute, mutates_args=())
"""Products that compiled code calls: kernels for CPUs are not made of operators that could be traced."""
_traced = operator("hasten::traced_quantized_linear")(_compute)
"""Products that compiled code takes in."""
_SHAPE, _ROTATION = 18, 22
"""Places of arguments of the operator."""


def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], rest[_SHAPE - 1][0])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, down, up = inputs[0], inputs[15], inputs[16]
    # The input is needed for nothing but the gradients of a side branch.
    kept = x if down is not None and (down.requires_grad or up.requires_grad) else None
    ctx.save_for_backward(*inputs[1:12], inputs[14], down, up, inputs[17], kept)
    ctx.facts, ctx.rotation = inputs[_SHAPE : _SHAPE + 3], inputs[_ROTATION]


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The weight is constant, and rounding of activations passes gradients through."""
    *tensors, smooth, down, up, rank_scale, x = ctx.saved_tensors
    shape, number, columns = ctx.facts
    weight = _weight_of(shape, number, columns, tensors)
    to_x = grad @ weight.dequantize(grad.dtype).reshape(weight.shape[0], -1)
    to_x = to_x if ctx.rotation == 1 else rotate(to_x, ctx.rotation)
    to_x = to_x if smooth is None else to_x / smooth.to(grad.dtype)
    bias = grad.sum(0) if ctx.needs_input_grad[12] else None
    if down is None:
        return (to_x, *[None] * 11, bias, *[None] * 10)
    by = 1 if rank_scale is None else rank_scale.to(grad.dtype)
    ranks = grad @ up.to(grad.dtype) * by
    to_down = (ranks.t() @ x).to(down.dtype) if x is not None else None
    to_up = (grad.t() @ (x @ down.to(x.dtype).t() * by)).to(up.dtype) if x is not None else None
    return (to_x + ranks @ down.to(grad.dtype), *[None] * 11, bias, None, None, to_down, to_up, *[None] * 6)


for _one in (_operator, _traced):
    _one.register_fake(_fake)
    _one.register_autograd(_gradient, setup_context=_remember)


def quantized_linear(
    x: torch.Tensor,
    weight: QuantizedWeight,
    bias: torch.Tensor | None = None,
    activations: Activations = "none",
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x @ weight.T + bias for x [..., inputs]; passes gradients to x and bias."""
    return multiply(Product(x, weight, bias, activations, input_scale))


def multiply(product: Product) -> torch.Tensor:
    """A product by the operator, for an input [..., inputs]; passes gradients to x, bias, `down` and `up`."""
    weight, tensors = product.weight, product.weight.tensors()
    facts = (weight.shape, weight.number.name, weight.columns, product.activations)
    parts = [tensors.get(name) for name in TENSORS]
    return operate(
        product.x, parts, product.bias, product.input_scale, *facts,
        smooth=product.smooth, rotation=product.rotation,
        down=product.down, up=product.up, rank_scale=product.rank_scale,
    )  # fmt: skip


def operate(
    x: torch.Tensor,
    tensors: list[torch.Tensor | None],
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    shape: tuple[int, ...],
    number: str,
    columns: int,
    activations: str,
    *,
    smooth: torch.Tensor | None = None,
    rotation: int = 1,
    down: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    rank_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same with the weight in the parts that `TENSORS` names; on a CPU a single node in compiled graphs."""
    flat = x.reshape(-1, x.shape[-1])
    facts = (list(shape), number, columns, activations, rotation)
    compute = _traced if x.is_cuda else _operator
    found = compute(flat, *tensors, bias, input_scale, smooth, down, up, rank_scale, *facts)  # pyright: ignore
    return cast(torch.Tensor, found).reshape(*x.shape[:-1], shape[0])


def tune(product: Product) -> str | None:
    """Measure the kernels on a product, and from now on use the fastest for its like; its name, or None if none ran."""
    return tuning.measure(product, [kernel for kernel in kernels(product.x.device) if kernel.takes(product)])


def chosen(product: Product, tokens: int) -> str:
    """The name of the kernel for a layer at so many tokens, without computing anything."""
    return choose(replace(product, x=product.x.new_empty(tokens, product.x.shape[-1]))).name
